"""HTTP to one provider: its connections, what is sent with every request, and where what goes wrong becomes our errors.

Source: docs/adr/0021-upstream-connections.md, docs/adr/0025-http-to-providers.md
"""

from __future__ import annotations

import asyncio
import socket as sockets
import ssl
import zlib
from collections.abc import Mapping
from pathlib import Path

import yarl
from aiohappyeyeballs import start_connection

from schemas.errors import Fault, ProviderFailed, ProviderNonsense, ProviderTimeout, ProviderUnreachable
from schemas.jobs import Job
from schemas.settings import WorkerSettings
from workers.providers.http_connection import HttpConnection
from workers.providers.patience import Patience
from workers.providers.turns import Gather

KEEP_ALIVE_S = 4.0  # an idle connection is dropped before uvicorn (5 s), and so vLLM, drops it under a request of ours
TRAILER_WAIT_S = 1.0  # after [DONE], for the end of the body: with it the connection can be used again
NEXT_ADDRESS_AFTER_S = 0.25  # of a name that has several, if one says nothing; RFC 8305
INFLATED_BYTES_MAX = 1024 * 1024  # at once, of an answer that is compressed although we asked for none
COMPRESSED = ("gzip", "x-gzip", "deflate")
# As OpenAI calls it; vLLM's X-Request-Id would become its own, which may not come twice.
OUR_NAME = b"X-Client-Request-Id"


class Upstream:
    """All requests to *base_url*; its connections belong to the loop that runs by the first of them.

    No cookies, no proxy from the environment, no redirect: the key goes to the configured address and nowhere else.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        max_concurrency: int,
        settings: WorkerSettings,
        socket: Path | None = None,
    ) -> None:
        """With *socket* the server is behind that Unix socket, and *base_url* only names it."""
        self._socket = socket
        self._base_url = yarl.URL(base_url)
        self._tls = ssl.create_default_context() if self._base_url.scheme == "https" else None
        ours = {
            "Host": self._base_url.host_port_subcomponent or "",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": "penstock",
        }
        given = [*ours.items(), *headers.items()]
        self._headers = {name.lower(): f"{name}: {value}" for name, value in given}  # lines; those of *headers* count
        self._starts: dict[tuple[str, str], bytes] = {}  # of requests, by method and path
        self._connect_timeout_s = settings.connect_timeout_s
        self._slots = asyncio.Semaphore(max_concurrency)  # an answer has one until it is over
        self._connections: set[HttpConnection] = set()
        self._idle: list[HttpConnection] = []  # the one that was used last at the end
        self._sweeper: asyncio.TimerHandle | None = None  # runs while some are idle
        self._trailing: set[UpstreamAnswer] = set()
        self._closed = False

    async def ask(
        self, method: str, path: str, *, body: bytes | None = None, patience: Patience, job: Job | None = None
    ) -> UpstreamAnswer:
        """The head of the answer, its body still to come. Cancelling this closes the connection.

        If it is for a *job*, the server is told a name of ours for it, by which its own logs can be searched: it tells its own only
        with the answer.
        Raises: ProviderUnreachable, ProviderTimeout, ProviderNonsense.
        """
        connection = await self._connection(patience)
        answer = UpstreamAnswer(connection, self)
        try:
            connection.ask(self._head(method, path, body, job), body or b"")
            await answer.begin(patience)
        except BaseException:
            answer.close()
            raise
        return answer

    async def aclose(self) -> None:
        self._closed = True
        for answer in tuple(self._trailing):
            answer.close()
        for connection in tuple(self._connections):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.sleep(0)  # in which they are closed

    def release(self, connection: HttpConnection) -> None:
        """Nobody uses *connection* any more. It is kept for the next request if this one is over, else closed now."""
        self._slots.release()
        if connection.lost:
            return
        if self._closed or not connection.reusable:
            connection.abort()
            return
        connection.drop()
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(KEEP_ALIVE_S, self._sweep, loop)

    def trails(self, answer: UpstreamAnswer, *, still: bool) -> None:
        """All of *answer* was said, and the end of its body is waited for *still*, or no more."""
        (self._trailing.add if still else self._trailing.discard)(answer)

    def _head(self, method: str, path: str, body: bytes | None, job: Job | None) -> bytes:
        start = self._starts.get((method, path))
        if start is None:
            start = self._starts[method, path] = self._start(method, path)
        name = b"" if job is None else b"%s: %s.%d\r\n" % (OUR_NAME, job.request_id.encode(), job.epoch)
        length = b"" if body is None else b"Content-Length: %d\r\n" % len(body)
        return start + name + length + b"\r\n"

    def _start(self, method: str, path: str) -> bytes:
        """What all requests to *path* begin with."""
        whole = self._base_url.raw_path.rstrip("/") + path
        target = self._base_url.with_path(whole, encoded=True, keep_query=True).raw_path_qs
        lines = (f"{method} {target} HTTP/1.1", *self._headers.values(), "")
        return "\r\n".join(lines).encode()

    async def _connection(self, patience: Patience) -> HttpConnection:
        """One that nobody uses, and a slot with it. Raises: ProviderUnreachable, ProviderTimeout."""
        if self._closed:
            raise ProviderUnreachable("This provider was closed.")
        if not self._slots.locked() and (idle := self._take_idle()) is not None:
            await self._slots.acquire()  # which waits for nothing
            return idle
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(min(loop.time() + self._connect_timeout_s, patience.until_s)):
                await self._slots.acquire()
                try:
                    return self._take_idle() or await self._connect(loop)
                except BaseException:
                    self._slots.release()
                    raise
        except TimeoutError as error:
            if loop.time() >= patience.until_s:
                raise patience.fault() from error
            raise ProviderTimeout(f"No connection to the provider within {self._connect_timeout_s:g} s.") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no name server could be asked for
            raise ProviderUnreachable from error

    def _take_idle(self) -> HttpConnection | None:
        since = asyncio.get_running_loop().time() - KEEP_ALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > since and connection.reusable:
                return connection
            connection.abort()
        return None

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Closes what has been idle for too long."""
        since = loop.time() - KEEP_ALIVE_S
        while self._idle and self._idle[0].idle_since <= since:
            self._idle.pop(0).abort()
        again_at = self._idle[0].idle_since + KEEP_ALIVE_S if self._idle else None
        self._sweeper = None if again_at is None else loop.call_at(again_at, self._sweep, loop)

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> HttpConnection:
        """Raises: OSError, UnicodeError."""

        def made() -> HttpConnection:
            return HttpConnection(self._on_lost)

        connection: HttpConnection
        if self._socket is not None:
            _, connection = await loop.create_unix_connection(made, str(self._socket))
        else:
            host, port = self._base_url.raw_host or "", self._base_url.port or 0
            addresses = await loop.getaddrinfo(host, port, type=sockets.SOCK_STREAM)
            sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_AFTER_S, interleave=1, loop=loop)
            try:
                name = None if self._tls is None else host
                _, connection = await loop.create_connection(made, sock=sock, ssl=self._tls, server_hostname=name)
            except BaseException:
                sock.close()
                raise
        if self._closed or not connection.reusable:  # a server that took it to close it at once
            connection.abort()
            raise ConnectionResetError
        self._connections.add(connection)
        return connection

    def _on_lost(self, connection: HttpConnection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class UpstreamAnswer:
    """An answer whose body is being read. Either `close` or `let_go` ends it.

    Names of *headers* are in lower case.
    """

    def __init__(self, connection: HttpConnection, upstream: Upstream) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._connection: HttpConnection | None = connection
        self._upstream = upstream
        self._whole = False
        self._inflater: _Inflater | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def begin(self, patience: Patience) -> None:
        """Returns when its head has come. Raises: ProviderUnreachable, ProviderTimeout, ProviderNonsense."""
        connection = self._connection
        assert connection is not None  # noqa: S101 - nobody has closed it yet
        while not connection.status:
            if connection.malformed:
                raise ProviderNonsense("The provider's answer is not HTTP.")
            if connection.lost:
                raise ProviderUnreachable
            await self._wait(connection, patience)
        self.status, self.headers = connection.status, connection.headers
        encoding = self.headers.get("content-encoding")
        if encoding is not None and encoding.lower() not in ("", "identity"):
            self._inflater = _Inflater(encoding.lower())

    @property
    def content_type(self) -> str | None:
        """In lower case, without parameters; None if it isn't stated."""
        stated = self.headers.get("content-type")
        return None if stated is None else stated.partition(";")[0].strip().lower()

    async def read(self, patience: Patience, *, gather: Gather | None = None) -> bytes:
        """What has come; waits where nothing has. Empty at the end, also where the connection broke: see `cut`.

        With *gather* what comes may be taken together with what comes to others.

        Raises: ProviderTimeout, ProviderNonsense.
        """
        connection = self._connection
        if connection is None:
            return b""
        while True:
            data = connection.take()
            if self._inflater is not None:
                data = self._inflater.inflate(data)
            if data:
                return data
            if connection.complete or connection.lost:
                self._whole = connection.complete
                return b""
            await self._wait(connection, patience, gather)

    async def _wait(self, connection: HttpConnection, patience: Patience, gather: Gather | None = None) -> None:
        try:
            await connection.wait(patience.until_s, gather)
        except TimeoutError as error:
            raise patience.fault() from error

    @property
    def cut(self) -> bool:
        """The connection broke before the body's end."""
        return not self._whole

    async def read_all(self, max_bytes: int, patience: Patience) -> bytes:
        """The whole body.

        Raises: as `read`; ProviderNonsense if it is over *max_bytes*, ProviderFailed if it was cut off.
        """
        pieces, size = [], 0
        while data := await self.read(patience):
            patience.renew()
            pieces.append(data)
            size += len(data)
            if size > max_bytes:
                raise ProviderNonsense(f"The provider sent an answer of more than {max_bytes} bytes.")
        if self.cut:
            raise ProviderFailed("The provider's answer ended early.")
        return b"".join(pieces)

    async def read_some(self, max_bytes: int, patience: Patience) -> bytes:
        """As much of a body that explains an error as there is, up to *max_bytes*."""
        pieces, size = [], 0
        try:
            while size < max_bytes and (data := await self.read(patience)):
                pieces.append(data)
                size += len(data)
        except Fault:
            pass
        return b"".join(pieces)[:max_bytes]

    def close(self) -> None:
        """Ends the work: the connection is closed now, unless the body has come to its end."""
        if self._connection is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._upstream.trails(self, still=False)
        connection, self._connection = self._connection, None
        self._upstream.release(connection)

    def let_go(self) -> None:
        """All is said, though perhaps not the HTTP body's end: that is waited for out of the way, but not for ever."""
        connection = self._connection
        if connection is None or connection.complete or connection.lost:
            self.close()
            return
        self._upstream.trails(self, still=True)
        self._timer = asyncio.get_running_loop().call_later(TRAILER_WAIT_S, self.close)
        connection.ignore(self.close)


class _Inflater:
    """What comes compressed although nobody asked for it: so do some proxies with errors."""

    def __init__(self, encoding: str) -> None:
        self._stream = zlib.decompressobj(32 + zlib.MAX_WBITS) if encoding in COMPRESSED else None

    def inflate(self, data: bytes) -> bytes:
        """Of what has come, as much as may be inflated at once. Raises: ProviderNonsense."""
        try:
            if self._stream is not None:
                return self._stream.decompress(self._stream.unconsumed_tail + data, INFLATED_BYTES_MAX)
        except zlib.error:
            pass
        raise ProviderNonsense("The provider's answer can't be decompressed.")
