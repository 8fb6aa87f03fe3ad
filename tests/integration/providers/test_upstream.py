"""HTTP as servers speak it, well and badly, and what becomes of the connection."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from schemas.errors import Fault, ProviderNonsense, ProviderTimeout, ProviderUnreachable
from schemas.settings import WorkerSettings
from tests.waiting import eventually
from workers.providers import upstream as upstream_module
from workers.providers.http_connection import HEAD_BYTES_MAX, READ_AHEAD_BYTES
from workers.providers.patience import Patience
from workers.providers.upstream import Upstream, UpstreamAnswer

OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"content-length: 2\r\n\r\nhi"
BYTES_MAX = 64 * 1024 * 1024

Speak = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Hands each connection to *speak*, which says what a server says; keeps the heads of the requests that it has read."""

    def __init__(self, speak: Speak, tls: ssl.SSLContext | None = None) -> None:
        self.connections = 0
        self.open = 0
        self._speak = speak
        self._tls = tls
        self._server: asyncio.Server
        self._speaking: set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> int:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", port, ssl=self._tls)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        for task in self._speaking:
            task.cancel()
        await asyncio.gather(*self._speaking, return_exceptions=True)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._speaking.add(task)
        self.connections += 1
        self.open += 1
        try:
            await self._speak(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            self._speaking.discard(task)
            writer.close()


@asynccontextmanager
async def serving(
    speak: Speak, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Server, int]]:
    server = Server(speak, tls)
    port = await server.start(port)
    try:
        yield server, port
    finally:
        await server.stop()


def saying(*answers: bytes, then_close: bool = False) -> Speak:
    """Says one of *answers* for each request, the last of them again and again."""

    left = list(answers)

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()
            if then_close:
                return

    return speak


@asynccontextmanager
async def calling(url: str, *, max_concurrency: int = 4) -> AsyncIterator[Upstream]:
    upstream = Upstream(url, {}, max_concurrency=max_concurrency, settings=WorkerSettings(connect_timeout_s=1.0))
    try:
        yield upstream
    finally:
        await upstream.aclose()


def patience(first_s: float = 5.0) -> Patience:
    return Patience(first_s=first_s, idle_s=first_s, total_s=60.0, clock=asyncio.get_running_loop().time)


async def get(upstream: Upstream, *, first_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body of an answer that is read to its end. Raises: Fault."""
    until = patience(first_s)
    answer = await upstream.ask("GET", "/models", patience=until)
    try:
        return answer.status, await answer.read_all(BYTES_MAX, until)
    finally:
        answer.close()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (OK + b"content-length: 2\r\n\r\nhi", (200, b"hi")),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1;x=y\r\ni\r\n0\r\nX-Late: 1\r\n\r\n", (200, b"hi")),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + WHOLE, (200, b"hi")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, (200, b"hi")),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", (404, b"")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
    ],
    ids=["length", "chunked", "early hints", "continue", "empty", "no content"],
)
async def test_an_answer_is_read_and_its_connection_used_again(said: bytes, expected: tuple[int, bytes]) -> None:
    async with serving(saying(said)) as (server, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        assert [await get(upstream) for _ in range(3)] == [expected] * 3
        assert server.connections == 1


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.0 200 OK\r\n\r\nhi",
        OK + b"\r\nhi",
        OK + b"connection: close\r\ncontent-length: 2\r\n\r\nhi",
    ],
    ids=["1.0", "until the end", "close"],
)
async def test_a_connection_that_ends_with_its_answer_is_not_used_again(said: bytes) -> None:
    async with (
        serving(saying(said, then_close=True)) as (server, port),
        calling(f"http://127.0.0.1:{port}/v1") as upstream,
    ):
        assert [await get(upstream) for _ in range(2)] == [(200, b"hi")] * 2
        assert server.connections == 2


async def test_an_answer_byte_by_byte_is_the_same_answer() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in WHOLE:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.001)
        await reader.read()

    async with serving(speak) as (_, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        assert await get(upstream) == (200, b"hi")


async def test_more_than_was_asked_for_is_nobodys_answer() -> None:
    """A second answer behind the first: the next request must not be given it."""
    stray = OK + b"content-length: 5\r\n\r\nstray"
    async with (
        serving(saying(WHOLE + stray, WHOLE)) as (server, port),
        calling(f"http://127.0.0.1:{port}/v1") as upstream,
    ):
        assert [await get(upstream) for _ in range(2)] == [(200, b"hi")] * 2
        assert server.connections == 2


async def test_what_comes_to_an_idle_connection_ends_it() -> None:
    late = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(WHOLE)
        await late.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await reader.read()

    async with serving(speak) as (server, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        assert await get(upstream) == (200, b"hi")
        late.set()
        await eventually(lambda: server.open == 0)
        assert await get(upstream) == (200, b"hi")
        assert server.connections == 2


@pytest.mark.parametrize("end", [UpstreamAnswer.close, UpstreamAnswer.let_go])
@pytest.mark.parametrize("size", [5, 2 * READ_AHEAD_BYTES])
async def test_what_nobody_took_of_an_answer_is_not_in_the_next(
    size: int, end: Callable[[UpstreamAnswer], None]
) -> None:
    """Whoever has found its stop in what it has read takes no more, although all of it has come."""
    first = OK + b"content-length: %d\r\n\r\n" % size + b"x" * size
    async with (
        serving(saying(first, WHOLE)) as (server, port),
        calling(f"http://127.0.0.1:{port}/v1") as upstream,
    ):
        answer = await upstream.ask("GET", "/models", patience=patience())
        connection = answer._connection
        assert connection is not None
        await eventually(lambda: connection.complete or connection._paused)
        end(answer)
        await eventually(lambda: upstream._idle == [connection] or connection.lost)
        assert connection.lost or (connection._body, connection._paused) == ([], False)
        assert await get(upstream) == (200, b"hi")
        assert server.connections == 1 + connection.lost


async def test_an_answer_before_the_whole_request_ends_the_connection() -> None:
    """What is left of the body would be read as the next request."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(60)

    async with serving(speak) as (server, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        answer = await upstream.ask("POST", "/chat/completions", body=b"x" * 64 * 1024 * 1024, patience=patience())
        assert (answer.status, await answer.read(patience())) == (413, b"")
        answer.close()
        assert upstream._idle == []
        await eventually(lambda: not upstream._connections)
        assert server.connections == 1


async def test_a_trailer_is_no_header() -> None:
    said = OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nretry-after: 1\r\n\r\n"
    async with serving(saying(said)) as (_, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        answer = await upstream.ask("GET", "/models", patience=patience())
        assert await answer.read_all(BYTES_MAX, patience()) == b"hi"
        assert answer.headers == {"transfer-encoding": "chunked"}
        answer.close()


async def test_given_headers_count_however_they_are_written() -> None:
    heads: list[bytes] = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(WHOLE)

    async with serving(speak) as (_, port):
        given = {"user-agent": "ours", "HOST": "models.example", "X-Org": "a"}
        upstream = Upstream(f"http://127.0.0.1:{port}/v1", given, max_concurrency=1, settings=WorkerSettings())
        assert await get(upstream) == (200, b"hi")
        await upstream.aclose()
    assert heads[0].decode().split("\r\n") == [
        "GET /v1/models HTTP/1.1",
        "HOST: models.example",
        "Accept: */*",
        "Accept-Encoding: identity",
        "user-agent: ours",
        "X-Org: a",
        "",
        "",
    ]


async def test_a_connection_that_its_server_closed_is_not_used_again() -> None:
    async with (
        serving(saying(WHOLE, then_close=True)) as (server, port),
        calling(f"http://127.0.0.1:{port}/v1") as upstream,
    ):
        for _ in range(3):
            assert await get(upstream) == (200, b"hi")
            await eventually(lambda: not upstream._connections)
        assert server.connections == 3


async def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "KEEP_ALIVE_S", 0.2)
    async with serving(saying(WHOLE)) as (server, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        await asyncio.gather(get(upstream), get(upstream))
        assert server.open == 2
        await eventually(lambda: server.open == 0)
        assert upstream._sweeper is None
        assert await get(upstream) == (200, b"hi")


@pytest.mark.parametrize(
    "said",
    [
        OK + b"x: " + b"y" * HEAD_BYTES_MAX,
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 2000,
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nhi!",
        OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    ],
    ids=["endless head", "endless hints", "upgrade", "two lengths", "length and chunks"],
)
async def test_what_no_client_should_believe_is_nonsense(said: bytes) -> None:
    async with serving(saying(said)) as (server, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        with pytest.raises(ProviderNonsense, match="not HTTP"):
            await get(upstream, first_s=2.0)
        await eventually(lambda: server.open == 0)


async def test_a_body_that_breaks_its_own_rules_is_cut() -> None:
    said = OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhi\r\nnot a number\r\n"
    async with serving(saying(said)) as (server, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        with pytest.raises(Fault, match="ended early"):
            await get(upstream)
        await eventually(lambda: server.open == 0)


async def test_a_server_that_is_faster_than_its_reader_waits() -> None:
    body = b"x" * 8 * 1024 * 1024

    async with (
        serving(saying(OK + b"content-length: %d\r\n\r\n" % len(body) + body)) as (_, port),
        calling(f"http://127.0.0.1:{port}/v1") as upstream,
    ):
        until = patience()
        answer = await upstream.ask("GET", "/models", patience=until)
        connection = answer._connection
        assert connection is not None
        await eventually(lambda: connection._paused)
        await asyncio.sleep(0.1)
        assert connection._body_bytes <= 2 * READ_AHEAD_BYTES
        assert len(await answer.read_all(BYTES_MAX, until)) == len(body)
        answer.close()
        assert await get(upstream) == (200, body)


async def test_a_rest_that_nobody_wants_is_not_kept() -> None:
    """Behind [DONE]: until it ends its connection is not closed, and nothing of it stays."""
    body = b"x" * 8 * 1024 * 1024
    async with (
        serving(saying(OK + b"content-length: %d\r\n\r\n" % len(body) + body)) as (server, port),
        calling(f"http://127.0.0.1:{port}/v1") as upstream,
    ):
        answer = await upstream.ask("GET", "/models", patience=patience())
        connection = answer._connection
        assert connection is not None
        await eventually(lambda: connection._paused)
        answer.let_go()
        assert connection._body == []
        await eventually(lambda: upstream._idle == [connection])
        assert connection._body == []
        assert await get(upstream) == (200, body)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)],
)
async def test_an_answer_is_unpacked(encoding: str, packed: Callable[[bytes], bytes]) -> None:
    body = b"0123456789" * 500_000  # more than is inflated at once
    said = packed(body)
    head = OK + f"content-encoding: {encoding}\r\ncontent-length: {len(said)}\r\n\r\n".encode()
    async with serving(saying(head + said)) as (_, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        assert await get(upstream) == (200, body)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip"])
async def test_what_can_not_be_unpacked_is_nonsense(encoding: str) -> None:
    said = OK + f"content-encoding: {encoding}\r\n".encode() + b"content-length: 5\r\n\r\nhello"
    async with serving(saying(said)) as (_, port), calling(f"http://127.0.0.1:{port}/v1") as upstream:
        with pytest.raises(ProviderNonsense, match="decompressed"):
            await get(upstream)


async def test_a_slot_is_free_again_whatever_became_of_its_request() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/whole" in head:
            writer.write(WHOLE)
        elif b"/half" in head:
            writer.write(OK + b"content-length: 9\r\n\r\nhi")
        elif b"/cut" in head:
            return
        await reader.read()

    async with serving(speak) as (server, port), calling(f"http://127.0.0.1:{port}", max_concurrency=2) as upstream:
        for path in ("/cut", "/silent", "/half", "/cancelled", "/whole") * 4:
            asking = asyncio.create_task(_read(upstream, path))
            if path == "/cancelled":
                await asyncio.sleep(0.02)
                asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        assert upstream._slots._value == 2
        await eventually(lambda: server.open == len(upstream._idle))
        assert len(upstream._connections) <= 2


async def test_what_may_be_taken_together_waits_until_it_is_taken() -> None:
    """The end of an answer, too; but not the end of its connection."""
    say = asyncio.Event()
    gathered: list[asyncio.Future[None]] = []

    def gather(reader: asyncio.Future[None]) -> bool:
        gathered.append(reader)
        return True

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"content-length: 6\r\n\r\n1")
        for rest in (b"23", b"4", b"5"):
            await say.wait()
            say.clear()
            writer.write(rest)
        await say.wait()

    async with serving(speak) as (_, port), calling(f"http://127.0.0.1:{port}") as upstream:
        until = patience()
        answer = await upstream.ask("GET", "/models", patience=until)
        assert await answer.read(until) == b"1"
        reading = asyncio.create_task(answer.read(until, gather=gather))
        for _ in range(2):
            await asyncio.sleep(0.05)
            say.set()
        await asyncio.sleep(0.1)
        assert not reading.done()
        assert len(gathered) == 1  # however much comes meanwhile
        gathered[0].set_result(None)
        assert await reading == b"234"

        reading = asyncio.create_task(answer.read(until, gather=gather))
        for _ in range(2):
            await asyncio.sleep(0.05)
            say.set()
        assert await reading == b"5"  # one byte was still to come, and now never will
        assert len(gathered) == 2
        assert not gathered[1].cancelled()
        assert await answer.read(until, gather=gather) == b""
        assert answer.cut
        answer.close()


async def test_what_has_come_in_time_is_not_late_because_it_waits_to_be_taken() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"content-length: 3\r\n\r\n1")
        await asyncio.sleep(0.05)
        writer.write(b"2")
        await asyncio.sleep(10.0)

    async with serving(speak) as (_, port), calling(f"http://127.0.0.1:{port}") as upstream:
        until = patience(0.3)
        answer = await upstream.ask("GET", "/models", patience=until)
        assert await answer.read(until) == b"1"
        assert await answer.read(until, gather=lambda _: True) == b"2"  # by then it was to be there, and was
        with pytest.raises(ProviderTimeout):
            await answer.read(until, gather=lambda _: True)
        answer.close()


async def _read(upstream: Upstream, path: str) -> bytes:
    until = patience(0.1)
    answer = await upstream.ask("GET", path, patience=until)
    try:
        return await answer.read_all(BYTES_MAX, until)
    finally:
        answer.close()


async def test_who_waits_for_a_connection_gets_the_next_that_is_free() -> None:
    async with (
        serving(saying(WHOLE)) as (server, port),
        calling(f"http://127.0.0.1:{port}", max_concurrency=1) as upstream,
    ):
        first = await upstream.ask("GET", "/", patience=patience())
        others = [asyncio.create_task(get(upstream)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(other.done() for other in others)
        await first.read_all(BYTES_MAX, patience())
        first.close()
        assert await asyncio.gather(*others) == [(200, b"hi")] * 3
        assert server.connections == 1


async def test_who_waits_for_a_connection_for_too_long_is_told() -> None:
    async with serving(saying(WHOLE)) as (_, port), calling(f"http://127.0.0.1:{port}", max_concurrency=1) as upstream:
        held = await upstream.ask("GET", "/", patience=patience())
        with pytest.raises(ProviderTimeout, match="No connection to the provider within 1 s"):
            await get(upstream)
        with pytest.raises(ProviderTimeout, match=r"did not begin to answer within 0\.1 s"):
            await get(upstream, first_s=0.1)
        held.close()


async def test_a_closed_provider_is_asked_nothing_and_leaves_nothing_open() -> None:
    async with serving(saying(WHOLE)) as (server, port):
        upstream = Upstream(f"http://127.0.0.1:{port}", {}, max_concurrency=4, settings=WorkerSettings())
        await asyncio.gather(get(upstream), get(upstream))
        answer = await upstream.ask("GET", "/", patience=patience())
        await upstream.aclose()
        await eventually(lambda: server.open == 0)
        answer.close()
        with pytest.raises(ProviderUnreachable, match="closed"):
            await get(upstream)


async def test_a_provider_that_is_closed_while_it_connects_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, may_resolve = asyncio.get_running_loop(), asyncio.Event()
    resolve = loop.getaddrinfo

    async def late(*args: Any, **more: Any) -> list[Any]:
        await may_resolve.wait()
        return list(await resolve(*args, **more))

    async with serving(saying(WHOLE)) as (server, port), calling(f"http://127.0.0.1:{port}") as upstream:
        monkeypatch.setattr(loop, "getaddrinfo", late)
        asking = asyncio.create_task(get(upstream))
        await asyncio.sleep(0)
        await upstream.aclose()
        may_resolve.set()
        with pytest.raises(ProviderUnreachable):
            await asking
        await eventually(lambda: server.open == 0)
        assert upstream._connections == set()


async def test_a_server_that_closes_a_connection_as_it_takes_it_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be known already when connecting returns: then nothing may be written, which some transports answer with an error."""
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def cut(*args: Any, **more: Any) -> Any:
        transport, protocol = await connect(*args, **more)
        transport.abort()
        await asyncio.sleep(0.01)
        return transport, protocol

    async with serving(saying(WHOLE)) as (_, port), calling(f"http://127.0.0.1:{port}") as upstream:
        monkeypatch.setattr(loop, "create_connection", cut)
        with pytest.raises(ProviderUnreachable):
            await get(upstream)
        assert (upstream._connections, upstream._slots._value) == (set(), 4)
        monkeypatch.undo()
        assert await get(upstream) == (200, b"hi")


async def test_a_name_with_a_dead_address_is_reached_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a machine has an IPv6 address and no way to the IPv6 network: its packets are answered by nobody."""
    with socket.socket() as full:
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.2", port))
        loop = asyncio.get_running_loop()

        resolve = loop.getaddrinfo

        async def two(host: str, *args: Any, **more: Any) -> list[Any]:
            hosts = ("127.0.0.2", "127.0.0.1") if host == "two.example" else (host,)
            return [found for each in hosts for found in await resolve(each, *args, **more)]

        async with serving(saying(WHOLE), port=port), calling(f"http://two.example:{port}") as upstream:
            monkeypatch.setattr(loop, "getaddrinfo", two)
            assert await get(upstream) == (200, b"hi")  # within the second that connecting may take
        for each in waiting:
            each.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for 127.0.0.1, and the file of who to trust for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "provider of a test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    public, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context, public


async def test_a_provider_behind_tls_is_known_by_its_certificate(
    certificate: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = certificate
    async with serving(saying(WHOLE), tls=context) as (server, port):
        async with calling(f"https://127.0.0.1:{port}/v1") as upstream:
            with pytest.raises(ProviderUnreachable):  # nobody vouches for it
                await get(upstream)
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        before = server.connections
        async with calling(f"https://127.0.0.1:{port}/v1") as upstream:
            assert [await get(upstream) for _ in range(3)] == [(200, b"hi")] * 3
            assert server.connections == before + 1
            until = patience()
            answer: UpstreamAnswer = await upstream.ask("GET", "/models", patience=until)
            answer.close()
        await eventually(lambda: server.open == 0)
        async with calling(f"https://localhost:{port}/v1") as upstream:
            with pytest.raises(ProviderUnreachable):  # it is another one's
                await get(upstream)
