"""uvicorn's HTTP protocol with the bounds it lacks: of the header's size and time, and of how long a client may read nothing.

llhttp takes headers of any length, and uvicorn's keep-alive timer does not run before a connection's first request or
while a header is half sent; a client that sends nothing, or one byte a minute, would hold its connection for ever. So would
one that stops reading: what is sent to it waits for room in its socket, and never returns.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ingress.problems import error_body
from schemas.ids import new_id
from schemas.settings import IngressSettings

CUT = "penstock.cut"  # in the scope's state: a function that ends the connection now, whatever has not been sent yet
TASKS = "penstock.tasks"  # in the scope's state: the set of the tasks that the server's drain waits for
LINGER_S = 1  # of a connection without a request, once the process stops
WRITE_TIMEOUT_S = 60.0  # for 48 KiB of what is sent to a client to be read by it

RESET = struct.pack("ii", 1, 0)  # linger for no time: close with a reset
_UPGRADE_HEADERS = frozenset({b"connection", b"upgrade", b"http2-settings"})
_ERROR_TYPE = "invalid_request_error"


class HeadersTooLargeError(Exception):
    """Stops the parser."""


class TooEarlyError(Exception):
    """Stops the parser: the request before this one is not answered yet."""


class BoundedProtocol(HttpToolsProtocol):
    """`bounded_protocol` makes the class with the deployment's own numbers; uvicorn makes one of it for each connection."""

    max_header_bytes: ClassVar[int]
    header_timeout_s: ClassVar[float]
    max_connections: ClassVar[int]
    write_timeout_s: ClassVar[float]

    _header_bytes = 0  # of what the parser told of
    _raw_bytes = 0  # of what came while the header was not complete
    _in_header = True
    _deaf = False  # a running answer may end; what comes is not read any more
    _leaving = False  # the process stops
    _header_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(b"503 Service Unavailable", "Too many connections. Retry shortly.", code="overloaded")
            return
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """In place of uvicorn's: its refusals are plain text, and each of them is a warning in the log."""
        if self._deaf or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        was_in_header = self._in_header
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, HeadersTooLargeError):
                self._refuse_header()
            else:
                self._refuse(b"400 Bad Request", "This is not a valid HTTP/1.1 request.", code="invalid_http")
        else:
            self._raw_bytes += len(data) if was_in_header and self._in_header else 0
            if self._raw_bytes > self.max_header_bytes:
                self._refuse_header()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])

    def _decline_upgrade(self, rest: bytes) -> None:
        """Reads the request again as if it had not offered another protocol, which a server may.

        The parser takes what follows such an offer for that other protocol's and skips the body. Java's own client offers
        HTTP/2 with its first request to every server.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(b"400 Bad Request", "This is no proxy.", code="invalid_http")
            return
        lines = [b"%b: %b" % each for each in self.headers if each[0] not in _UPGRADE_HEADERS]
        head = b"\r\n".join([b"%b %b HTTP/1.1" % (method, self.url), *lines, b"", b""])
        self.parser = httptools.HttpRequestParser(self)
        self._feed(head + rest)

    def on_message_begin(self) -> None:
        if self._is_answering():
            # uvicorn would stop reading until the answer is sent, and so not see its client leave.
            raise TooEarlyError
        super().on_message_begin()
        self.scope["state"][CUT] = self.cut
        self.scope["state"][TASKS] = self.tasks
        self._in_header = True
        self._header_bytes = self._raw_bytes = 0
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def on_url(self, url: bytes) -> None:
        self._header_bytes += len(url)
        if self._header_bytes > self.max_header_bytes:
            raise HeadersTooLargeError
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self.max_header_bytes:
            raise HeadersTooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._stop_header_timer()
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            if not self.expect_100_continue:  # which is said alone, and first
                self.cycle.transport = cast("asyncio.Transport", _Together(self.transport, self.cycle))
            if self._leaving:
                self.cycle.keep_alive = False  # and so its answer says

    def shutdown(self) -> None:
        """The process stops. In place of uvicorn's, which closes what is idle: a request may be on its way there just then.

        Instead the next answer tells its client to connect anew, and where none is asked for the connection stays for `LINGER_S`.
        """
        self._leaving = True
        self.timeout_keep_alive = LINGER_S  # behind an answer whose headers have promised more
        if not self._is_answering():
            self._linger_timer = self.loop.call_later(LINGER_S, self._leave)
        elif not self.cycle.response_started:
            self.cycle.keep_alive = False

    def _leave(self) -> None:
        if not self._is_answering():
            self.transport.close()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_timeout_s, self.cut)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def cut(self) -> None:
        """Ends the connection now. What was written and not read yet is lost; whoever waits to write more goes on."""
        if self.transport.is_closing():
            return
        if self.cycle is not None:
            self.cycle.disconnected = True
        # Without it the kernel would keep what it holds, megabytes, for as long as the client's side stays open.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _too_slow(self) -> None:
        self._header_timer = None
        self._refuse(
            b"408 Request Timeout",
            f"The request's headers did not arrive within {self.header_timeout_s:g} s.",
            code="request_timeout",
        )

    def _refuse_header(self) -> None:
        self._refuse(
            b"431 Request Header Fields Too Large",
            f"The request's headers are over the limit of {self.max_header_bytes} bytes.",
            code="headers_too_large",
        )

    def _refuse(self, status: bytes, message: str, *, code: str) -> None:
        """Says why, and closes. While an answer is under way nothing can be said: it ends, and the connection with it."""
        self._stop_header_timer()
        if self.transport.is_closing():
            return
        if self._is_answering():
            self._deaf = True
            self.cycle.keep_alive = False
            return
        body = error_body(message, type_=_ERROR_TYPE, param=None, code=code)
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\nconnection: close"
        self.transport.write(head % (status, len(body), new_id().encode()) + b"\r\n\r\n" + body)
        self.transport.close()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class _Together:
    """The transport of one answer, until its head is written: that waits, in this turn of the loop, for the first of the body.

    Both go out in one piece: a system call less, and the client wakes once.
    """

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle) -> None:
        self._transport = transport
        self._cycle = cycle
        self._head = b""
        self._alone: asyncio.Handle | None = None  # what writes it when nothing follows

    def write(self, data: bytes) -> None:
        if self._alone is None:
            self._head = data
            self._alone = asyncio.get_running_loop().call_soon(self._write, b"")
        else:
            self._alone.cancel()
            self._write(data)

    def _write(self, data: bytes) -> None:
        self._cycle.transport = self._transport
        whole, self._head = self._head + data, b""
        if not self._transport.is_closing():
            self._transport.write(whole)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        if self._alone is not None and not self._alone.cancelled():
            self._alone.cancel()
            self._write(b"")
        self._transport.close()


def bounded_protocol(settings: IngressSettings, *, write_timeout_s: float = WRITE_TIMEOUT_S) -> type[BoundedProtocol]:
    """The protocol class with the bounds of *settings*, for uvicorn's ``http``."""
    bounds = {
        "max_header_bytes": settings.max_header_bytes,
        "header_timeout_s": settings.header_timeout_s,
        "max_connections": settings.max_connections,
        "write_timeout_s": write_timeout_s,
    }
    return type("ConfiguredProtocol", (BoundedProtocol,), bounds)


def cut_of(state: dict[str, Any]) -> Callable[[], None]:
    """What ends a connection now, from its scope's *state*; nothing where another server runs the application."""
    found: Callable[[], None] = state.get(CUT, _nothing)
    return found


def tasks_of(state: dict[str, Any]) -> set[asyncio.Future[None]]:
    """What the server waits for when it stops, from a scope's *state*; nobody's set where another server runs the application."""
    found: set[asyncio.Future[None]] = state.get(TASKS, set())
    return found


def _nothing() -> None:
    pass
