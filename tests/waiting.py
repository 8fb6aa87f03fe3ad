"""Waiting for something to become true, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(
    check: Callable[[], T | Awaitable[T]], *, timeout_s: float = 5.0, what: str = "", every_s: float = 0.01
) -> T:
    """The first truthy value of *check*; what it raises counts as not yet.

    Raises: AssertionError with *what* and the last value or error when *timeout_s* is over.
    """
    until = time.monotonic() + timeout_s
    while True:
        last: object
        try:
            value = check()
            result: T = await value if inspect.isawaitable(value) else value
            last = result
            if result:
                return result
        except (AssertionError, LookupError, OSError, ValueError) as error:
            last = error
        if time.monotonic() > until:
            raise AssertionError(f"{what or 'it'} did not become true within {timeout_s} s; last: {last!r}")
        await asyncio.sleep(every_s)
