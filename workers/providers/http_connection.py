"""One HTTP/1.1 connection to a provider: a request goes out at once, and its answer is there as it comes.

llhttp reads what comes; what there is between it and the first byte of a chunk is here, and as little as can be.
Source: docs/adr/0025-http-to-providers.md
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

import httptools

from workers.providers.turns import Gather

READ_AHEAD_BYTES = 256 * 1024  # of a body; the server waits while more than that is here and not taken
HEAD_BYTES_MAX = 64 * 1024  # of an answer
TOGETHER_BYTES_MAX = 64 * 1024  # a longer body is not copied behind its head
_EARLIEST_FINAL_STATUS = 200  # those before it announce another answer


class HttpConnection(asyncio.Protocol):
    """For one request at a time: `ask`, then `wait` until the *status* is there (0 before that), then `take` until it is *complete*.

    *lost*: it is closed. *malformed*: it was, because what came is not HTTP.
    Names of *headers* are in lower case; of a header that comes more than once it is the first.
    """

    def __init__(self, on_lost: Callable[[HttpConnection], None]) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = True
        self.lost = False
        self.malformed = False
        self.idle_since = 0.0  # by the loop's clock, while nobody uses it
        self._keeps = True  # it may be used again, as far as was said on it
        self._on_lost = on_lost
        self._on_over: Callable[[], None] | None = None  # set while what comes is of no interest
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._gather: Gather | None = None  # where the waiter may be told with others
        self._gathered = False  # it will be

    @property
    def reusable(self) -> bool:
        """Another request may be sent."""
        return self.complete and self._keeps and not self._transport.is_closing()

    def ask(self, head: bytes, body: bytes) -> None:
        """Sends a request. What was left of the answer before it is dropped."""
        self.drop()
        self.status, self.headers, self.complete, self._head_bytes = 0, {}, False, 0
        if len(body) <= TOGETHER_BYTES_MAX:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    async def wait(self, until_s: float, gather: Gather | None = None) -> None:
        """Returns when something has come, or it is lost. With *gather*, what has come may wait for others to be told together.

        Raises: TimeoutError at *until_s*, by the loop's clock.
        """
        self._waiter = waiter = self._loop.create_future()
        self._gather, self._gathered = gather, False
        timer = self._loop.call_at(until_s, self._expire, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = self._gather = None

    def take(self) -> bytes:
        """What has come of the body; empty if nothing has."""
        if not self._body:
            return b""
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self.drop()
        return data

    def ignore(self, on_over: Callable[[], None]) -> None:
        """Takes the rest of the answer for nobody; *on_over* is called when it is complete or lost."""
        self._on_over = on_over
        self.drop()

    def drop(self) -> None:
        """Forgets what has come of the body and was not taken: it must never be read as part of the next answer."""
        self._body.clear()
        self._body_bytes = 0
        self._go_on()

    def abort(self) -> None:
        """Closes it now; what was not sent is not."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        made = transport.get_extra_info("socket")
        if made is not None:  # so that a server whose machine vanished is noticed by the system, too
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if exc is None and self.status and not self.complete and self._ends_with_connection():
            self.complete, self._keeps = True, False
        self._tell()
        self._on_lost(self)

    def eof_received(self) -> None:
        self._keeps = False  # it closes itself now

    def data_received(self, data: bytes) -> None:
        if self.complete:  # nobody has asked for it
            self._keeps = False
            self.abort()
            return
        if not self.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.malformed = True
        if self.malformed or (not self.status and self._head_bytes > HEAD_BYTES_MAX):
            self.malformed, self._keeps = True, False
            self.abort()
        self._tell()

    def on_message_begin(self) -> None:
        if self.complete:
            self._keeps = False  # more has come than was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it is a trailer, or of an answer that nobody has asked for
            self.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= _EARLIEST_FINAL_STATUS and not self.complete:
            self.status = status

    def on_body(self, body: bytes) -> None:
        if self._on_over is not None or self.complete:
            return
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > READ_AHEAD_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if not self.status:
            self.headers = {}  # of an announcement
            return
        self.complete = True
        said_early = (
            self._transport.get_write_buffer_size() > 0
        )  # what isn't sent of its request would be read as the next
        self._keeps = self._keeps and self._parser.should_keep_alive() and not said_early

    def _ends_with_connection(self) -> bool:
        """Whether the answer says of itself neither how long it is nor where it ends."""
        return "content-length" not in self.headers and "transfer-encoding" not in self.headers

    def _go_on(self) -> None:
        if self._paused:
            self._paused = False
            if not self.lost:
                self._transport.resume_reading()

    def _tell(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done() and not self._can_wait(waiter):
            waiter.set_result(None)
        if self._on_over is not None and (self.complete or self.lost):
            on_over, self._on_over = self._on_over, None
            on_over()

    def _can_wait(self, waiter: asyncio.Future[None]) -> bool:
        """Whether *waiter* will be told of it later. A lost connection doesn't wait."""
        if self._gather is None or self.lost:
            return False
        self._gathered = self._gathered or self._gather(waiter)
        return self._gathered

    def _expire(self, waiter: asyncio.Future[None]) -> None:
        if waiter.done():
            return
        if self._gathered:  # it has come in time
            waiter.set_result(None)
        else:
            waiter.set_exception(TimeoutError())
