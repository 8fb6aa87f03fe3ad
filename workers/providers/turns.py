"""What comes to many streams of one server is taken in turns: together, a few milliseconds after the first of it came.

Source: docs/adr/0024-turns.md
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

TURN_S = 0.008
BUSY_STREAMS = 8  # with fewer, nothing is waited for

Gather = Callable[[asyncio.Future[None]], bool]


class Turns:
    """A server of a worker has one."""

    def __init__(self) -> None:
        self._streams = 0
        self._waiting: list[asyncio.Future[None]] = []  # one for each stream at most, for one turn at most

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Counts a stream while it runs."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def gather(self, reader: asyncio.Future[None]) -> bool:
        """Something has come for *reader*, which is resolved with the turn. False while few streams run: then nothing waits."""
        if self._streams < BUSY_STREAMS:
            return False
        if not self._waiting:
            asyncio.get_running_loop().call_later(TURN_S, self._take)
        self._waiting.append(reader)
        return True

    def _take(self) -> None:
        waiting, self._waiting = self._waiting, []
        for reader in waiting:
            if not reader.done():  # a stream may end or be cancelled meanwhile
                reader.set_result(None)
