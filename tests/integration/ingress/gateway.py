"""The whole way of a request inside this process: a real NATS, an ingress, a worker, a provider that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import msgspec
import openai
import pytest
import uvicorn
from uvicorn.server import ServerState

import tests.sdk
from bus.claims import Claims
from bus.connection import Connection, Message, connect
from bus.control import ControlFeed
from bus.log import EventLog
from bus.presence import Beacon
from bus.publisher import Publisher
from bus.queue import JobQueue
from bus.streams import ensure_streams
from ingress.app import build_app
from ingress.bootstrap import Setup, state_setup
from ingress.exchange import Services
from ingress.fleet import LOST_AFTER_S, Fleet
from ingress.hedging import Hedges
from ingress.neighbours import Neighbours
from ingress.protocol import WRITE_TIMEOUT_S, bounded_protocol
from ingress.relay import Switchboard
from ingress.router import Router
from schemas import subjects
from schemas.again import Holder
from schemas.control import Role
from schemas.ids import IngressId, RouteId, WorkerId, new_name
from schemas.jobs import Timeouts
from schemas.money import Price
from schemas.settings import (
    IngressSettings,
    ModelSettings,
    NatsSettings,
    RouteSettings,
    RoutingSettings,
    WorkerSettings,
)
from tests.mock_provider import MockProvider
from tests.waiting import eventually
from workers.providers import make_provider
from workers.providers.accounts import Rules
from workers.route import Route
from workers.worker import Worker

CLIENT_KEY = "sk-test-client-0123456789"
ADMIN_KEY = "sk-test-admin-0123456789"
MODEL = "public/model-1"
UPSTREAM_MODEL = "upstream-model"
PRICE = Price(input=150_000, cached_input=75_000, output=600_000)
SLOTS = 8

Event = dict[str, Any]


class HttpServer:
    """uvicorn's protocol on a free port, without its main loop, which looks only every 100 ms whether it should stop."""

    def __init__(self, app: Any, settings: IngressSettings, *, write_timeout_s: float) -> None:
        self._protocol = bounded_protocol(settings, write_timeout_s=write_timeout_s)
        self._config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False)
        self._config.load()
        self.state = ServerState()

    async def start(self) -> int:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: self._protocol(self._config, self.state, {}), "127.0.0.1", 0
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        for connection in list(self.state.connections):
            connection.transport.abort()
        await eventually(lambda: not self.state.tasks and not self.state.connections, what="an idle server")


@dataclass(kw_only=True)
class IngressUnderTest:
    base_url: str
    switchboard: Switchboard
    fleet: Fleet
    log: EventLog
    connection: Connection
    server: HttpServer


@dataclass(kw_only=True)
class Gateway:
    """What a test drives. *events* are the events as they were published, in order."""

    nats_url: str
    mock: MockProvider
    ingress: IngressUnderTest
    worker: Worker
    route: Route
    events: list[Event] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return self.ingress.base_url

    @property
    def chat_url(self) -> str:
        return f"{self.base_url}/chat/completions"

    def of(self, request_id: str | None, kind: str | None = None) -> list[Event]:
        """The events of one request."""
        return [e for e in self.events if e["request_id"] == request_id and kind in (None, e["kind"])]

    async def ending(self, request_id: str | None = None) -> Event:
        """The one closing event of the request, or of the only request there was."""

        def found() -> list[Event]:
            ends = [e for e in self.events if e["kind"] in ("request.finished", "request.rejected")]
            return [e for e in ends if request_id in (None, e["request_id"])]

        await eventually(found, what="a closing event")
        (event,) = found()
        return event

    async def receipt(self, request_id: str) -> Event:
        """The worker's one event of the request's attempt."""
        await eventually(lambda: self.of(request_id, "attempt.finished"), what="a receipt")
        (event,) = self.of(request_id, "attempt.finished")
        return event

    async def quiet(self) -> None:
        """Returns when nothing is left of any request: no relay, no slot taken, nothing running."""
        await eventually(lambda: len(self.ingress.switchboard) == 0, what="an empty switchboard")
        await eventually(lambda: self.route.free == self.route.slots, what="free slots")
        await eventually(lambda: not any(each._task for each in self.mock._live), what="an idle provider")
        await eventually(lambda: not self.ingress.server.state.tasks, what="no request's task")

    async def jobs_waiting(self, count: int) -> None:
        """Returns when *count* jobs are in the queue."""

        async def check() -> bool:
            answer = await self.ingress.connection.api("STREAM.INFO.JOBS")
            return int(answer["state"]["messages"]) == count

        await soon(check, what=f"{count} jobs in the queue")


Headers = dict[str, str]


def bearer(key: str = CLIENT_KEY) -> Headers:
    return {"authorization": f"Bearer {key}"}


def headers_of(response: aiohttp.ClientResponse) -> Headers:
    """With names in lower case."""
    return {name.lower(): value for name, value in response.headers.items()}


def body(content: str = "one two three", **members: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **members}


def sdk(base_url: str, key: str = CLIENT_KEY) -> openai.AsyncOpenAI:
    return tests.sdk.sdk(base_url, key)


def route_settings(mock: MockProvider, *, name: str = "mock", slots: int = SLOTS) -> RouteSettings:
    return RouteSettings(
        id=RouteId(name),
        provider="openai",
        base_url=mock.base_url,
        max_concurrency=slots,
        models=(ModelSettings(name=MODEL, upstream=UPSTREAM_MODEL, price=PRICE),),
    )


@contextlib.asynccontextmanager
async def ingress_up(
    nats_url: str,
    *,
    settings: IngressSettings,
    routes: tuple[RouteSettings, ...] = (),
    routing: RoutingSettings | None = None,
    clock: Callable[[], float] = time.monotonic,
    write_timeout_s: float = WRITE_TIMEOUT_S,
    lost_after_s: float = LOST_AFTER_S,
) -> AsyncIterator[IngressUnderTest]:
    """An ingress put together as ingress/process.py does it, but in this process and without signal handlers.

    *clock* is the router's.
    """
    name = IngressId(new_name("ingress"))
    connection = await connect(nats_url, name=name)
    await ensure_streams(connection, NatsSettings())
    connection.on_reconnect(lambda: ensure_streams(connection, NatsSettings()))
    publisher = Publisher(connection)
    await publisher.start()
    log = EventLog(connection, publisher, producer=name, fence=subjects.fence(name))
    beacon = Beacon(connection, name, on_lapse=log.look_for_fence)
    control = ControlFeed(connection, publisher)
    await control.start()
    setup = Setup(keys=((CLIENT_KEY, Role.CLIENT), (ADMIN_KEY, Role.ADMIN)), routes=routes)
    await state_setup(control, setup, producer=name)
    switchboard = Switchboard(connection, ingress=name, max_bytes_per_relay=settings.max_buffered_bytes)
    await switchboard.start()
    fleet = Fleet(connection, lost_after_s=lost_after_s)
    fleet.on_lost(switchboard.lose)
    fleet.on_changed(switchboard.rouse_waiting)
    await fleet.start()
    neighbours = Neighbours(connection, name)
    await neighbours.start()
    router = Router(fleet, control, routing or RoutingSettings(), clock=clock)
    services = Services(
        ingress=name,
        log=log,
        refusals=EventLog(connection, publisher, producer=f"{name}-refusals"),
        queue=JobQueue(connection, publisher),
        switchboard=switchboard,
        router=router,
        timeouts=settings.timeouts,
        keep_alive_comment_s=settings.keep_alive_comment_s,
        claims=Claims(connection, publisher),
        neighbours=neighbours,
        hedges=Hedges(router, after_s=settings.hedge_after_s) if settings.hedge else None,
    )
    app = build_app(connection, services, control=control, fleet=fleet, settings=settings)
    server = HttpServer(app, settings, write_timeout_s=write_timeout_s)
    await beacon.start()
    port = await server.start()
    try:
        yield IngressUnderTest(
            base_url=f"http://127.0.0.1:{port}/v1",
            switchboard=switchboard,
            fleet=fleet,
            log=log,
            connection=connection,
            server=server,
        )
    finally:
        await server.stop()
        await beacon.stop()
        await fleet.stop()
        await control.stop()
        await publisher.stop()
        await connection.close()


@contextlib.asynccontextmanager
async def worker_up(
    nats_url: str, route: RouteSettings, *, settings: WorkerSettings | None = None, rules: Rules | None = None
) -> AsyncIterator[tuple[Worker, Route]]:
    name = WorkerId(new_name("worker"))
    settings = settings or WorkerSettings(drain_s=0.2)
    connection = await connect(nats_url, name=name)
    publisher = Publisher(connection)
    await publisher.start()
    served = Route(route, make_provider(route, settings, rules=rules), route.models)
    worker = Worker(
        connection,
        EventLog(connection, publisher, producer=name),
        [served],
        worker=name,
        settings=settings,
        nats_settings=NatsSettings(),
    )
    await worker.start()
    try:
        yield worker, served
    finally:
        await worker.drain()
        await served.provider.aclose()
        await publisher.stop()
        await connection.close()


@contextlib.asynccontextmanager
async def gateway_up(
    nats_url: str,
    mock: MockProvider,
    *,
    ingress: IngressSettings | None = None,
    worker: WorkerSettings | None = None,
    slots: int = SLOTS,
    **bounds: float,
) -> AsyncIterator[Gateway]:
    """*bounds* are those of `ingress_up`."""
    route = route_settings(mock, slots=slots)
    async with (
        ingress_up(nats_url, settings=ingress or IngressSettings(), routes=(route,), **bounds) as up,
        worker_up(nats_url, route, settings=worker) as (running, served),
    ):
        made = Gateway(nats_url=nats_url, mock=mock, ingress=up, worker=running, route=served)

        async def on_page(msg: Message) -> None:
            made.events.extend(msgspec.json.decode(line) for line in msg.data.split(b"\n") if line)

        await up.connection.listen("events.>", on_page)
        await eventually(lambda: up.fleet.offers(MODEL), what="the worker's presence")
        yield made


async def soon(check: Callable[[], Awaitable[bool]], *, what: str = "", timeout_s: float = 5.0) -> None:
    """`eventually` for what has to be asked for."""
    await eventually(check, what=what, timeout_s=timeout_s)  # type: ignore[arg-type]  # T is inferred from the coroutine


OpenGateway = Callable[..., Awaitable[Gateway]]


def timeouts(**changes: float) -> Timeouts:
    return Timeouts(**{"queue_s": 10.0, "first_token_s": 10.0, "idle_s": 10.0, "total_s": 20.0, **changes})


class Lines:
    """The events of a stream as they come over the wire, without any SDK between."""

    def __init__(self, session: aiohttp.ClientSession, url: str, given: dict[str, Any], key: str = CLIENT_KEY) -> None:
        self._request = session.post(url, json=given, headers=bearer(key))
        self.headers: Headers = {}
        self.status = 0
        self.ids: list[int] = []  # of the events that came

    async def __aenter__(self) -> Self:
        self._response = await self._request.__aenter__()
        self.status = self._response.status
        self.headers = headers_of(self._response)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._request.__aexit__(*error)  # type: ignore[arg-type]  # as they came

    @property
    def request_id(self) -> str:
        return self.headers["x-request-id"]

    async def next(self) -> bytes:
        """The next event, without its id, or comment; empty at the end."""
        lines = []
        while (line := await self._response.content.readline()).strip():
            if line.startswith(b":"):
                return line.rstrip(b"\n")
            if line.startswith(b"id: "):
                self.ids.append(int(line[4:]))
            else:
                lines.append(line.rstrip(b"\n"))
        return b"\n".join(lines)

    async def rest(self) -> list[bytes]:
        found = []
        while event := await self.next():
            found.append(event)
        return found

    async def chunks(self) -> list[dict[str, Any]]:
        """The data of all events up to ``[DONE]``, decoded, which must be there and last."""
        events = [event for event in await self.rest() if not event.startswith(b":")]
        assert events[-1] == b"data: [DONE]"
        return [msgspec.json.decode(event.removeprefix(b"data: ")) for event in events[:-1]]


class Wire:
    """A client without manners: a TCP connection and nothing else."""

    def __init__(self, base_url: str) -> None:
        self._port = int(base_url.split(":")[2].split("/", maxsplit=1)[0])

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.vanish()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def vanish(self) -> None:
        self.writer.transport.abort()

    def head(self, *, length: int | None = None, key: str = CLIENT_KEY, chunked: bool = False, **further: str) -> None:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {key}"]
        lines += [] if length is None else [f"Content-Length: {length}"]
        lines += ["Transfer-Encoding: chunked"] if chunked else []
        lines += [f"{name}: {value}" for name, value in further.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def ask(self, given: dict[str, Any], **headers: str) -> None:
        raw = msgspec.json.encode(given)
        self.head(length=len(raw), **headers)
        self.send(raw)

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, Headers, Any]:
        """Status, headers and the decoded body of one answer with a Content-Length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        raw = await self.reader.readexactly(int(headers["content-length"]))
        return int(first.split(" ")[1]), headers, msgspec.json.decode(raw)

    async def closed(self) -> bool:
        """Whether the server ends the connection, and sends nothing more before."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


def slow_to_give_back(monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    """An Idempotency-Key is free only so long after its request has ended without a cost."""
    give_back = Claims.give_back

    async def slowly(claims: Claims, name: str, holder: Holder) -> None:
        await asyncio.sleep(delay_s)
        await give_back(claims, name, holder)

    monkeypatch.setattr(Claims, "give_back", slowly)
