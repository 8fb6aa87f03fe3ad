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
from collections.abc import Callable
from itertools import count

import structlog

from bus.connection import WRONG_LAST_SEQUENCE, ApiError, BusUnavailable, Connection, MessageTooLarge
from bus.publisher import Publisher
from bus.streams import PAGE_MAX_BYTES
from schemas import codec, subjects
from schemas.errors import LogUnavailable
from schemas.events import Event

log = structlog.get_logger()

PAGE_EVENTS_MAX = 1024
PAGE_HEADER_BYTES = 512  # room for the message id and the fence: the stream's bound counts the headers, too
EVENT_MAX_BYTES = PAGE_MAX_BYTES - PAGE_HEADER_BYTES
WAITING_EVENTS_MAX = 100_000
ACK_TIMEOUT_S = 5.0
RETRY_WAIT_S = 0.1
SWEEP_EVERY_S = 0.25
RETRY_BLINDLY_FOR_S = 300.0  # shorter than the stream's duplicate window, in which it knows a page by its message id

EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_LAST_SUBJECT = "Nats-Expected-Last-Subject-Sequence-Subject"

NO_MESSAGE = 10037
PAGE_REFUSED = 10054  # "message size exceeds maximum allowed": trying again can't help
FENCED = "This server was out of reach for too long, and its requests have been closed. Retry."


class Appended(asyncio.Future[None]):
    """Resolves when its event is durable. *stored* is what became of that, also for who had stopped waiting by then."""

    stored: bool | None = None


class EventLog:
    """Appends the events of one *producer*; each producer has a subject of its own.

    With a *fence*, a subject of the same stream, nothing is stored any more once there is a message on that. The stream itself
    sees to it, so what stands before the fence is all there is. *on_fenced* is called when this is noticed.
    """

    def __init__(
        self,
        connection: Connection,
        publisher: Publisher,
        *,
        producer: str,
        fence: str | None = None,
        on_fenced: Callable[[], None] | None = None,
    ) -> None:
        self.producer = producer
        self.fenced = False
        self._fence = fence
        self._on_fenced = on_fenced
        self._conditions = {} if fence is None else {EXPECTED_LAST: "0", EXPECTED_LAST_SUBJECT: fence}
        self._connection = connection
        self._publisher = publisher
        self._subject = subjects.events(producer)
        self._waiting: deque[tuple[bytes, Appended | None]] = deque()
        self._session = os.urandom(6).hex()
        self._pages = count()
        self._writer: asyncio.Task[None] | None = None
        self._due: asyncio.TimerHandle | None = None  # for what waits for company
        self._deadlines: dict[asyncio.Future[None], float] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def append(self, event: Event) -> Appended:
        """Takes *event* at once, in the order of the calls; the future resolves when it is durable.

        Raises: LogUnavailable at once when too many wait, *event* is larger than a page, or the log is fenced.
        """
        future = Appended(loop=self._loop)
        self._take(event, future)
        return future

    def withdraw(self, appended: Appended) -> bool:
        """Takes back the event of *appended*, if it was not sent yet. What is on its way may be stored at any time."""
        for place, (_, future) in enumerate(self._waiting):
            if future is appended:
                del self._waiting[place]
                return True
        return False

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

    def note(self, event: Event, *, within_s: float = 0.0) -> None:
        """Like `append`, for events that nobody waits for; nobody misses one behind a fence.

        It may wait *within_s* for another one to share a page with.
        Raises: LogUnavailable at once when too many wait or *event* is larger than a page.
        """
        self._take(event, None, within_s=within_s)

    async def flush(self) -> None:
        """Returns when everything that was taken is durable or has failed."""
        self._begin()
        while self._writer is not None:
            await asyncio.wait([self._writer])

    async def look_for_fence(self) -> None:
        """For a process that was out of reach: notices a fence now instead of with the next page.

        Raises: ApiError, BusUnavailable.
        """
        if not self.fenced and await self._is_fenced():
            self._stop()

    def _take(self, event: Event, future: Appended | None, *, within_s: float = 0.0) -> None:
        if self.fenced:
            if future is None:
                return
            raise LogUnavailable(FENCED)
        if len(self._waiting) >= WAITING_EVENTS_MAX:
            raise LogUnavailable
        line = codec.encode(event)
        if len(line) > EVENT_MAX_BYTES:  # no page could hold it, and those behind it would wait for ever
            raise LogUnavailable(f"an event of {len(line)} bytes is larger than a page of the log")
        self._waiting.append((line, future))
        if within_s == 0:
            self._begin()
        elif self._due is None and self._writer is None:
            self._due = self._loop.call_later(within_s, self._begin)

    def _begin(self) -> None:
        """Writes what waits, if nobody is at it."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._writer is None and self._waiting:
            self._writer = asyncio.create_task(self._write_pages(), name="event-log")

    async def _write_pages(self) -> None:
        try:
            while self._waiting:
                lines, futures = self._next_page()
                error = await self._write(b"\n".join(lines))
                for future in futures:
                    future.stored = error is None
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

    def _next_page(self) -> tuple[list[bytes], list[Appended]]:
        lines: list[bytes] = []
        futures: list[Appended] = []
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
                blindly = self._loop.time() - began < RETRY_BLINDLY_FOR_S
                stored = (not blindly and await self._is_last(number)) or await self._publish(page, number)
            except (BusUnavailable, ApiError, MessageTooLarge) as error:
                if isinstance(error, MessageTooLarge) or getattr(error, "error_code", None) == PAGE_REFUSED:
                    return LogUnavailable(f"the event log could not be written: {error.message}")
                if not failed:
                    log.warning("event_log_unavailable", error=error.message, waiting=len(self._waiting))
                failed = True
                await asyncio.sleep(RETRY_WAIT_S)
            except Exception:  # whatever it is: its callers wait, and what was taken must not be lost
                log.exception("event_log_broke")
                failed = True
                await asyncio.sleep(RETRY_WAIT_S)
            else:
                if failed:
                    log.info("event_log_back", waiting=len(self._waiting))
                return None if stored else LogUnavailable(FENCED)

    async def _publish(self, page: bytes, number: str) -> bool:
        """Stores *page*, if it isn't stored. False if there is a fence before it.

        Raises: ApiError, BusUnavailable, MessageTooLarge.
        """
        headers = {"Nats-Msg-Id": number, **self._conditions}
        try:
            await self._publisher.publish(self._subject, page, timeout_s=ACK_TIMEOUT_S, headers=headers)
        except ApiError as error:
            if error.error_code not in WRONG_LAST_SEQUENCE:  # it may be a fence, or this page itself
                raise
            if await self._is_last(number):
                return True  # stored before the fence, and its acknowledgement was lost
            if not await self._is_fenced():
                raise
            self._stop()
            return False
        return True

    async def _is_fenced(self) -> bool:
        """Raises: ApiError, BusUnavailable."""
        return self._fence is not None and await self._last_on(self._fence) is not None

    def _stop(self) -> None:
        """Behind the fence: who waits is told, and nothing more is taken."""
        if self.fenced:
            return
        self.fenced = True
        log.error("log_fenced", waiting=len(self._waiting))
        for _, future in self._waiting:
            if future is None:
                continue
            future.stored = False
            if not future.done():
                future.set_exception(LogUnavailable(FENCED))
        self._waiting.clear()
        if self._on_fenced is not None:
            self._on_fenced()

    async def _is_last(self, number: str) -> bool:
        """Whether the page with the message id *number* was stored already: nobody else writes to our subject.

        Raises: ApiError, BusUnavailable.
        """
        headers = await self._last_on(self._subject)
        return headers is not None and f"Nats-Msg-Id: {number}\r\n".encode() in headers

    async def _last_on(self, subject: str) -> bytes | None:
        """The headers of the last message on *subject*; None if there is none.

        Raises: ApiError, BusUnavailable.
        """
        message = await _last_message(self._connection, subject)
        return None if message is None else base64.b64decode(message.get("hdrs", ""))


async def last_page(connection: Connection, *, producer: str) -> list[bytes]:
    """The events, a line each, of the last page that *producer* wrote; none if it wrote nothing.

    Raises: ApiError, BusUnavailable.
    """
    message = await _last_message(connection, subjects.events(producer))
    return [] if message is None else base64.b64decode(message.get("data", "")).split(b"\n")


async def _last_message(connection: Connection, subject: str) -> dict[str, str] | None:
    """Raises: ApiError, BusUnavailable."""
    try:
        answer = await connection.api(f"STREAM.MSG.GET.{subjects.EVENTS}", {"last_by_subj": subject})
    except ApiError as error:
        if error.error_code == NO_MESSAGE:
            return None
        raise
    message: dict[str, str] = answer["message"]
    return message
