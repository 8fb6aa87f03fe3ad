"""Many streams of one server are read in turns, so that what comes to them meanwhile goes on together.

Source: docs/adr/0024-turns.md
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

TURN_S = 0.008
BUSY_STREAMS = 8  # with fewer, nothing is waited for


class Turns:
    """A server of a worker has one. No stream that gets less than a token in `TURN_S` waits for anything.

    One that has just been read is read again with the next turn, which is the same one for all. Whatever comes later than that
    is read when it comes.
    """

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

    async def next(self) -> None:
        """Returns at once while few streams run, else when the turn comes."""
        if self._streams < BUSY_STREAMS:
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        if not self._waiting:
            loop.call_later(TURN_S, self._take)
        self._waiting.append(turn)
        await turn

    def _take(self) -> None:
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():  # a stream may be cancelled while it waits
                turn.set_result(None)
