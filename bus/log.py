"""The event log: append an event, and know when it is durable.

Group commit: the events that wait go out as one message, a *page* (JSON lines). While a page is on its way the next one
fills; when its acknowledgement comes, its callers go on. So there is one fsync a page, and under load a page has many
events (docs/adr/0002-pages.md has the figures).
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections import deque
from itertools import count

import structlog

from bus.connection import ApiError, BusUnavailable, Connection, MessageTooLarge
from bus.publisher import Publisher
from bus.streams import PAGE_MAX_BYTES
from schemas import codec, subjects
from schemas.errors import LogUnavailable
from schemas.events import Event

log = structlog.get_logger()

PAGE_EVENTS_MAX = 1024
PAGE_HEADER_BYTES = 256  # room for the message id: the stream's bound counts the headers, too
EVENT_MAX_BYTES = PAGE_MAX_BYTES - PAGE_HEADER_BYTES
WAITING_EVENTS_MAX = 100_000
ACK_TIMEOUT_S = 5.0
RETRY_WAIT_S = 0.1
SWEEP_EVERY_S = 0.25
RETRY_BLINDLY_FOR_S = 300.0  # shorter than the stream's duplicate window, in which it knows a page by its message id

NO_MESSAGE = 10037
PAGE_REFUSED = 10054  # "message size exceeds maximum allowed": trying again can't help


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
        self._deadlines: dict[asyncio.Future[None], float] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def append(self, event: Event) -> asyncio.Future[None]:
        """Takes *event* at once, in the order of the calls; the future resolves when it is durable.

        Raises: LogUnavailable at once when too many wait or *event* is larger than a page.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._take(event, future)
        return future

    async def record(self, event: Event, *, within_s: float) -> None:
        """Appends *event* and returns when it is durable.

        Raises: LogUnavailable if that takes longer than *within_s*; the event is kept, and written when the log is back.
        """
        await self.durable(self.append(event), within_s=within_s)

    async def durable(self, appended: asyncio.Future[None], *, within_s: float) -> None:
        """Returns when what `append` gave is durable. Raises: LogUnavailable if that takes longer than *within_s*."""
        if not appended.done():
            self._deadlines[appended] = self._loop.time() + within_s
            if self._sweeper is None:
                self._sweeper = asyncio.create_task(self._sweep(), name="event-log-sweep")
        try:
            await appended
        finally:
            self._deadlines.pop(appended, None)

    async def _sweep(self) -> None:
        """Ends the waits whose time is over. One look at all, four times a second, costs less than a timer for each."""
        while self._deadlines:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = self._loop.time()
            for appended, until in list(self._deadlines.items()):
                if now > until and not appended.done():
                    appended.set_exception(LogUnavailable())
        self._sweeper = None

    def note(self, event: Event) -> None:
        """Like `append`, for events that nobody waits for.

        Raises: LogUnavailable at once when too many wait or *event* is larger than a page.
        """
        self._take(event, None)

    async def flush(self) -> None:
        """Returns when everything that was taken is durable or has failed."""
        while self._writer is not None:
            await asyncio.wait([self._writer])

    def _take(self, event: Event, future: asyncio.Future[None] | None) -> None:
        if len(self._waiting) >= WAITING_EVENTS_MAX:
            raise LogUnavailable
        line = codec.encode(event)
        if len(line) > EVENT_MAX_BYTES:  # no page could hold it, and those behind it would wait for ever
            raise LogUnavailable(f"an event of {len(line)} bytes is larger than a page of the log")
        self._waiting.append((line, future))
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
            if lines and size > EVENT_MAX_BYTES:
                break
            line, future = self._waiting.popleft()
            lines.append(line)
            if future is not None:
                futures.append(future)
        return lines, futures

    async def _write(self, page: bytes) -> LogUnavailable | None:
        """Stores *page* once, trying with the same message id for as long as the stream can't be reached."""
        number = f"{self._session}.{next(self._pages)}"
        began = self._loop.time()
        failed = False
        while True:
            try:
                if self._loop.time() - began < RETRY_BLINDLY_FOR_S or not await self._is_last(number):
                    headers = {"Nats-Msg-Id": number}
                    await self._publisher.publish(self._subject, page, timeout_s=ACK_TIMEOUT_S, headers=headers)
            except (BusUnavailable, ApiError, MessageTooLarge) as error:
                if isinstance(error, MessageTooLarge) or getattr(error, "error_code", None) == PAGE_REFUSED:
                    return LogUnavailable(f"the event log could not be written: {error.message}")
                if not failed:
                    log.warning("event_log_unavailable", error=error.message, waiting=len(self._waiting))
                failed = True
                await asyncio.sleep(RETRY_WAIT_S)
            else:
                if failed:
                    log.info("event_log_back", waiting=len(self._waiting))
                return None

    async def _is_last(self, number: str) -> bool:
        """Whether the page with the message id *number* was stored already: nobody else writes to our subject.

        Raises: ApiError, BusUnavailable.
        """
        try:
            answer = await self._connection.api(f"STREAM.MSG.GET.{subjects.EVENTS}", {"last_by_subj": self._subject})
        except ApiError as error:
            if error.error_code == NO_MESSAGE:
                return False
            raise
        headers = base64.b64decode(answer["message"].get("hdrs", ""))
        return f"Nats-Msg-Id: {number}\r\n".encode() in headers
