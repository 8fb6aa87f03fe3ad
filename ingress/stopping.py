"""What a task does that is cut off because the process stops."""

from __future__ import annotations

import asyncio


def uncancel() -> None:
    """It was told to wait no longer, and goes on all the same: it has something to say yet."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
