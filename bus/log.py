"""The event log: append an event, and know when it is durable.

Group commit: the events that wait go out as one message, a *page* (JSON lines). While a page is on its way the next one
fills; when its acknowledgement comes, its callers go on. So there is one fsync a page, and under load a page has many
events (docs/adr/0002-pages.md has the figures).
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from itertools import count

import structlog

from bus.connection import ApiError, BusUnavailable, Connection
from bus.publisher import Publisher
from bus.streams import PAGE_MAX_BYTES
from schemas import codec, subjects
from schemas.errors import LogUnavailable
from schemas.events import Event

log = structlog.get_logger()

PAGE_EVENTS_MAX = 1024
WAITING_EVENTS_MAX = 100_000
ACK_TIMEOUT_S = 5.0
RETRY_WAIT_S = 0.1
RETRY_FOR_S = 300.0  # shorter than the stream's duplicate window, so that a page can't be stored twice


class EventLog:
    """Appends the events of one *producer*; each producer has a subject of its own."""

    def __init__(self, connection: Connection, publisher: Publisher, *, producer: str) -> None:
        self.producer = producer
        self._connection = connection
        self._publisher = publisher
        self._subject = subjects.events(producer)
        self._waiting: deque[tuple[bytes, asyncio.Future[None] | None]] = deque()
        self._session = os.urandom(6).hex()
        self._pages = count()
        self._writer: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def append(self, event: Event) -> asyncio.Future[None]:
        """Takes *event* at once, in the order of the calls; the future resolves when it is durable.

        Raises: LogUnavailable at once when too many wait, or through the future when the log gives up.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._take(event, future)
        return future

    async def record(self, event: Event, *, within_s: float) -> None:
        """Appends *event* and returns when it is durable.

        Raises: LogUnavailable if that takes longer than *within_s*; the event is kept, and written when the log is back.
        """
        await self.durable(self.append(event), within_s=within_s)

    @staticmethod
    async def durable(appended: asyncio.Future[None], *, within_s: float) -> None:
        """Returns when what `append` gave is durable. Raises: LogUnavailable if that takes longer than *within_s*."""
        try:
            async with asyncio.timeout(within_s):
                await appended
        except TimeoutError as error:
            raise LogUnavailable from error

    def note(self, event: Event) -> None:
        """Like `append`, for events that nobody waits for.

        Raises: LogUnavailable at once when too many wait.
        """
        self._take(event, None)

    async def flush(self) -> None:
        """Returns when everything that was taken is durable or has failed."""
        while self._writer is not None:
            await asyncio.wait([self._writer])

    def _take(self, event: Event, future: asyncio.Future[None] | None) -> None:
        if len(self._waiting) >= WAITING_EVENTS_MAX:
            raise LogUnavailable
        self._waiting.append((codec.encode(event), future))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_pages(), name="event-log")

    async def _write_pages(self) -> None:
        try:
            while self._waiting:
                lines, futures = self._next_page()
                error = await self._write(b"\n".join(lines))
                for future in futures:
                    if future.done():
                        continue
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(error)
                if error is not None:
                    log.error("events_lost", events=len(lines), error=error.message)
        finally:
            self._writer = None

    def _next_page(self) -> tuple[list[bytes], list[asyncio.Future[None]]]:
        lines: list[bytes] = []
        futures: list[asyncio.Future[None]] = []
        size = 0
        while self._waiting and len(lines) < PAGE_EVENTS_MAX:
            size += len(self._waiting[0][0]) + 1
            if lines and size > PAGE_MAX_BYTES:
                break
            line, future = self._waiting.popleft()
            lines.append(line)
            if future is not None:
                futures.append(future)
        return lines, futures

    async def _write(self, page: bytes) -> LogUnavailable | None:
        """Stores *page*, trying again with the same message id while the stream can't be reached."""
        headers = {"Nats-Msg-Id": f"{self._session}.{next(self._pages)}"}
        until = self._loop.time() + RETRY_FOR_S
        while True:
            try:
                await self._publisher.publish(self._subject, page, timeout_s=ACK_TIMEOUT_S, headers=headers)
            except (BusUnavailable, ApiError) as error:
                if self._loop.time() > until:
                    return LogUnavailable(f"the event log could not be written: {error.message}")
                await asyncio.sleep(RETRY_WAIT_S)
            else:
                return None
