"""Waiting for something to become true, instead of sleeping and hoping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tests.stopwatch import Stopwatch

PATIENCE = 4
SOON_S = 0.3

T = TypeVar("T")


async def eventually(
    check: Callable[[], T | Awaitable[T]], *, timeout_s: float = 5.0, what: str = "", every_s: float = 0.01
) -> T:
    """The first truthy value of *check*; what it raises counts as not yet.

    On a busy machine it waits longer by what its processes stood in line for a processor, up to `PATIENCE` times as long.

    Raises: AssertionError with *what* and the last value or error when *timeout_s* is over.
    """
    began = time.monotonic()
    watch: Stopwatch | None = None  # to make one takes some milliseconds, which most waits are shorter than
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
        passed_s = time.monotonic() - began
        if watch is None and passed_s > min(SOON_S, timeout_s / 2):
            watch = Stopwatch()
        if (
            watch is not None
            and passed_s > timeout_s
            and passed_s > timeout_s + min(watch.waited_s, (PATIENCE - 1) * timeout_s)
        ):
            raise AssertionError(f"{what or 'it'} did not become true within {timeout_s} s; last: {last!r}")
        await asyncio.sleep(every_s)
