"""A worker that discovers, on a real nats-server, and what an ingress would hear of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import structlog.testing

from bus.connection import Connection, Message, connect
from bus.log import EventLog
from bus.publisher import Publisher
from bus.queue import JobQueue
from bus.server import EmbeddedServer
from schemas import codec, subjects
from schemas.frames import AnyFrame, Delta, Faulted, Finished
from schemas.ids import IngressId, Nonce, RouteId, WorkerId, new_name
from schemas.jobs import Job, Presence, RouteOffer
from schemas.settings import NatsSettings, RouteSettings, WorkerSettings
from tests.factories import new_job
from tests.local_servers import Server
from tests.waiting import eventually
from workers.discover import Discovery
from workers.local.found import Pace
from workers.worker import Worker

INGRESS = IngressId("ingress-test")
FAST = Pace(poll_every_s=0.05, answer_wait_s=0.8, stranger_every_s=0.05, retry_min_s=0.1, retry_max_s=0.4)


@dataclass
class Machine:
    """One machine with a worker that discovers; *heard* is the latest presence of each worker, *frames* those of each job."""

    worker: Worker
    discovery: Discovery
    connection: Connection
    queue: JobQueue
    heard: dict[WorkerId, Presence] = field(default_factory=dict)
    frames: dict[Nonce, list[AnyFrame]] = field(default_factory=dict)

    def offer(self, route: str) -> RouteOffer | None:
        presence = self.heard.get(self.worker.id)
        return next((offer for offer in presence.routes if offer.route == route), None) if presence else None

    def down(self, route: str) -> str:
        """Why the route takes no jobs; empty if it does, or isn't there."""
        offer = self.offer(route)
        return "" if offer is None else offer.down or ""

    def served(self, route: str) -> list[str]:
        """The models that an ingress would send jobs for."""
        offer = self.offer(route)
        return [] if offer is None or offer.down is not None else sorted(model.name for model in offer.models)

    async def serves(self, route: str, *models: str, timeout_s: float = 5.0) -> None:
        await eventually(
            lambda: self.served(route) == sorted(models), what=f"{route} serves {models}", timeout_s=timeout_s
        )

    async def send(self, route: str, model: str, body: dict[str, Any] | None = None) -> Job:
        job = new_job({"model": model, **(body or {})}, model=model, route=RouteId(route), ingress=INGRESS)
        await self.queue.publish(job)
        return job

    async def ended(self, job: Job) -> Finished | Faulted:
        def last() -> AnyFrame | None:
            frame = self.frames[job.nonce][-1]
            return frame if isinstance(frame, Finished | Faulted) else None

        frame = await eventually(last, what="the attempt's last frame")
        assert isinstance(frame, Finished | Faulted)
        return frame

    def text(self, job: Job) -> str:
        chunks = [c for f in self.frames[job.nonce] if isinstance(f, Delta | Finished) for c in f.chunks]
        choices = [choice for chunk in chunks for choice in msgspec.json.decode(chunk)["choices"]]
        said = [choice.get("message") or choice["delta"] for choice in choices]
        return "".join(each.get("content") or "" for each in said)


Boot = Callable[..., Awaitable[Machine]]


@pytest.fixture
async def boot(nats_server: EmbeddedServer) -> AsyncIterator[Boot]:
    """Starts machines, each with a worker that looks at the addresses of the servers that it is given."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *servers: Server, routes: tuple[RouteSettings, ...] = (), pace: Pace = FAST, **settings: Any
        ) -> Machine:
            addresses = tuple(server.address for server in servers)
            given = WorkerSettings(drain_s=0.2, discover_addresses=addresses, **settings)
            return await stack.enter_async_context(_machine(nats_server, given, routes, pace))

        yield start


@contextlib.asynccontextmanager
async def _machine(
    nats: EmbeddedServer, settings: WorkerSettings, routes: tuple[RouteSettings, ...], pace: Pace
) -> AsyncIterator[Machine]:
    name = WorkerId(new_name("worker"))
    connection = await connect(nats.url, name=name)
    publisher = Publisher(connection)
    await publisher.start()
    log = EventLog(connection, publisher, producer=name)
    worker = Worker(connection, log, [], worker=name, settings=settings, nats_settings=NatsSettings())
    discovery = Discovery(worker, routes, settings, pace=pace)
    machine = Machine(worker, discovery, connection, JobQueue(connection, publisher))

    async def on_presence(msg: Message) -> None:
        presence = codec.decode_presence(msg.data)
        machine.heard[presence.worker] = presence

    async def on_frame(msg: Message) -> None:
        _, nonce = subjects.frame_address(msg.subject)
        machine.frames.setdefault(nonce, []).append(codec.decode_frame(msg.data))

    await connection.listen(subjects.ALL_PRESENCE, on_presence)
    await connection.listen(subjects.frames_filter(INGRESS), on_frame)
    await worker.start()
    discovery.start()
    try:
        yield machine
    finally:
        await discovery.stop()
        await worker.drain()
        await discovery.aclose()
        await publisher.stop()
        await connection.close()


@pytest.fixture
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with structlog.testing.capture_logs() as lines:
        yield lines
