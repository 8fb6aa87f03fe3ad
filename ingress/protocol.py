"""uvicorn's HTTP protocol with the bounds it lacks: of the header's size and of the time it may take.

llhttp takes headers of any length, and uvicorn's keep-alive timer does not run before a connection's first request or
while a header is half sent; a client that sends nothing, or one byte a minute, would hold its connection for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ingress.problems import error_body
from schemas.settings import IngressSettings


class BoundedProtocol(HttpToolsProtocol):
    """`bounded_protocol` makes the class with the deployment's own numbers; uvicorn makes one of it for each connection."""

    max_header_bytes: ClassVar[int]
    header_timeout_s: ClassVar[float]
    max_connections: ClassVar[int]

    _header_bytes = 0
    _in_header = True
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(b"503 Service Unavailable", "Too many connections. Retry shortly.", code="overloaded")
            return
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_header:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_header and self._header_bytes > self.max_header_bytes and not self.transport.is_closing():
            self._refuse(
                b"431 Request Header Fields Too Large",
                f"The request's headers are over the limit of {self.max_header_bytes} bytes.",
                code="headers_too_large",
            )

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = True
        self._header_bytes = 0
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._stop_timer()
        super().on_headers_complete()

    def _too_slow(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self._refuse(
                b"408 Request Timeout",
                f"The request's headers did not arrive within {self.header_timeout_s:g} s.",
                code="request_timeout",
            )

    def _refuse(self, status: bytes, message: str, *, code: str) -> None:
        body = error_body(message, type_="invalid_request_error", param=None, code=code)
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (status, len(body), body)
        )
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def bounded_protocol(settings: IngressSettings) -> type[BoundedProtocol]:
    """The protocol class with the bounds of *settings*, for uvicorn's ``http``."""
    bounds = {
        "max_header_bytes": settings.max_header_bytes,
        "header_timeout_s": settings.header_timeout_s,
        "max_connections": settings.max_connections,
    }
    return type("ConfiguredProtocol", (BoundedProtocol,), bounds)
