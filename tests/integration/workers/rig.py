"""A worker with a provider that does as it is told, and the ingress's side of it: jobs out, frames and presence in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import msgspec

from bus.connection import Connection, Message, connect
from bus.log import EventLog
from bus.publisher import Publisher
from bus.puller import Puller
from bus.queue import JobQueue
from bus.reader import OrderedReader
from bus.server import EmbeddedServer
from bus.streams import stream_state
from schemas import codec, subjects
from schemas.errors import PenstockError
from schemas.events import AttemptFinished
from schemas.frames import AnyFrame, Delta, Finished, Started
from schemas.ids import IngressId, Nonce, RouteId, WorkerId, new_name
from schemas.jobs import Cancel, Command, Continues, EngineStats, Job, Lane, Presence
from schemas.settings import ModelSettings, NatsSettings, RouteSettings, WorkerSettings
from tests.factories import new_job
from workers.providers.base import Chunk, Provider, Tell
from workers.route import Route
from workers.worker import Worker

INGRESS = IngressId("ingress-test")
ROUTE = RouteId("pool")
PIECE = Chunk(members=b'{"choices":[{"index":0,"delta":{"content":"x"}}]}', tokens=1)
LAST = Chunk(members=b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}', finish_reason="stop")

Behave = Callable[[Job], AsyncGenerator[Chunk, None]]


class Fake(Provider):
    """A provider that counts who is at it. *behave* says what it does with a job; by default it answers at once."""

    name = "fake"

    def __init__(self, behave: Behave | None = None) -> None:
        self.running: dict[Nonce, Job] = {}
        self.most = 0
        self.taken: list[Nonce] = []
        self.ended_at: dict[Nonce, float] = {}
        self.tell: Tell = lambda _: None
        self.room: int | None = None
        self.said: EngineStats | None = None
        self._behave = behave or answers

    def upstream_model(self, model: str) -> str:
        return f"upstream-{model}"

    async def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        self.running[job.nonce] = job
        self.most = max(self.most, len(self.running))
        self.taken.append(job.nonce)
        try:
            async for chunk in self._behave(job):
                yield chunk
        finally:
            del self.running[job.nonce]
            self.ended_at[job.nonce] = time.monotonic()

    async def models(self) -> tuple[str, ...]:
        return ("m",)

    def continues(self, _: str) -> Continues:
        return Continues.NO

    def fingerprint(self, _: str) -> None:
        return None

    def slots(self) -> int | None:
        return self.room

    def stats(self) -> EngineStats | None:
        return self.said

    def attach(self, tell: Tell) -> None:
        self.tell = tell

    async def aclose(self) -> None:
        pass


async def answers(_: Job) -> AsyncGenerator[Chunk, None]:
    yield PIECE
    await asyncio.sleep(0)
    yield LAST


async def hangs(_: Job) -> AsyncGenerator[Chunk, None]:
    yield PIECE
    await asyncio.Event().wait()


def waits_for(gate: asyncio.Event) -> Behave:
    async def behave(_: Job) -> AsyncGenerator[Chunk, None]:
        yield PIECE
        await gate.wait()
        yield LAST

    return behave


class Station:
    """A worker and what it needs, as a process of its own would have it."""

    def __init__(
        self, worker: Worker, route: Route, provider: Fake, connection: Connection, publisher: Publisher
    ) -> None:
        self.worker = worker
        self.route = route
        self.provider = provider
        self.connection = connection
        self._publisher = publisher

    @property
    def idle(self) -> bool:
        return not self.worker._running and self.route.free == self.route.slots

    @property
    def pullers(self) -> list[Puller]:
        return [] if self.route.intake is None else list(self.route.intake._pullers.values())

    @property
    def credit(self) -> int:
        """Jobs that it may still get; as many as there are free slots."""
        return sum(puller._credit for puller in self.pullers)

    def deliver(self, job: Job) -> None:
        """As if the job had just come, without the event loop's turn in which its task would begin."""
        subject = subjects.job(model=job.model, route=job.route, lane=Lane.INTERACTIVE, org=job.org)
        message = Message(_client=None, subject=subject, reply="reply", data=codec.encode(job))
        self.worker._on_delivery(self.route, message, self.pullers[0])

    async def close(self) -> None:
        if self.connection.nc.is_closed:
            return
        await self.worker.drain()
        await self._publisher.stop()
        await self.connection.close()


async def open_station(
    url: str, *, provider: Fake | None = None, slots: int = 4, drain_s: float = 5.0, further: int = 0
) -> Station:
    """*further* routes come behind the first."""
    name = WorkerId(new_name("worker"))
    provider = provider or Fake()
    connection = await connect(url, name=name)
    publisher = Publisher(connection)
    await publisher.start()
    models = (ModelSettings(name="m"),)
    route, *others = [
        Route(RouteSettings(id=id_, provider="fake", max_concurrency=slots, models=models), each, models)
        for id_, each in [(ROUTE, provider), *((RouteId(f"{ROUTE}-{n}"), Fake()) for n in range(further))]
    ]
    worker = Worker(
        connection,
        EventLog(connection, publisher, producer=name),
        [route, *others],
        worker=name,
        settings=WorkerSettings(drain_s=drain_s),
        nats_settings=NatsSettings(),
    )
    try:
        await worker.start()
    except PenstockError:
        await publisher.stop()
        await connection.close()
        raise
    return Station(worker, route, provider, connection, publisher)


class Line:
    """A cable to the server that can swallow what is said to it, or *only* what has these bytes in it, and be cut."""

    def __init__(self, server: EmbeddedServer, *, only: bytes = b"") -> None:
        self.swallows = False
        self.only = only
        self.swallowed = 0
        self._login, _, self._address = server.url.removeprefix("nats://").rpartition("@")
        self._listener: asyncio.Server | None = None
        self._ends: list[asyncio.StreamWriter] = []

    async def open(self) -> str:
        """Where to connect instead."""
        self._listener = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"nats://{self._login}@127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for end in ends:
            end.transport.abort()

    async def close(self) -> None:
        self.cut()
        if self._listener is not None:
            self._listener.close()
            await self._listener.wait_closed()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._address.rpartition(":")
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        self._ends += [writer, server_writer]
        with suppress(OSError):
            await asyncio.gather(self._carry(reader, server_writer, up=True), self._carry(server_reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool = False) -> None:
        while data := await reader.read(65536):
            if up and self.swallows and self.only in data:
                self.swallowed += len(data)
            else:
                writer.write(data)
                await writer.drain()
        writer.close()


class Desk:
    """The ingress's side: publishes jobs, keeps the frames by nonce in the order in which they came, and all presence."""

    def __init__(self, connection: Connection, publisher: Publisher) -> None:
        self.frames: dict[Nonce, list[AnyFrame]] = {}
        self.presence: list[Presence] = []
        self.presence_at: list[float] = []
        self.queue = JobQueue(connection, publisher)
        self.publisher = publisher
        self.connection = connection

    async def start(self) -> None:
        await self.connection.listen(subjects.frames_filter(INGRESS), self._on_frame)
        await self.connection.listen(subjects.ALL_PRESENCE, self._on_presence)
        await self.connection.nc.flush()

    async def publish(self, **changes: Any) -> Job:
        job = job_for(**changes)
        await self.queue.publish(job)
        return job

    async def publish_many(self, jobs: int, **changes: Any) -> list[Job]:
        return list(await asyncio.gather(*(self.publish(**changes) for _ in range(jobs))))

    async def cancel(self, job: Job, reason: str = "client_left") -> None:
        (started,) = [frame for frame in self.frames[job.nonce] if isinstance(frame, Started)]
        await self.command(started.worker, Cancel(nonce=job.nonce, reason=reason))

    async def command(self, worker: WorkerId, command: Command) -> None:
        await self.connection.say(subjects.ctl(worker), codec.encode(command))

    def of(self, job: Job) -> list[AnyFrame]:
        return self.frames.get(job.nonce, [])

    def kinds(self, job: Job) -> list[type[AnyFrame]]:
        return [type(frame) for frame in self.of(job)]

    def chunks(self, job: Job) -> int:
        return sum(len(frame.chunks) for frame in self.of(job) if isinstance(frame, Delta | Finished))

    def is_done(self, job: Job) -> bool:
        return any(isinstance(frame, Finished) for frame in self.of(job))

    def all_done(self, jobs: list[Job]) -> bool:
        return all(self.is_done(job) for job in jobs)

    async def receipts(self) -> list[AttemptFinished]:
        """All that are stored by now."""
        last = (await stream_state(self.connection, "EVENTS"))["last_seq"]
        reader = OrderedReader(self.connection, stream="EVENTS")
        await reader.start()
        lines: list[bytes] = []
        seen = 0
        while seen < last:
            messages = await reader.batch(max_messages=100, wait_s=5.0)
            lines += [line for message in messages for line in message.data.split(b"\n")]
            seen = messages[-1].seq
        await reader.close()
        return [_decode_receipt(line) for line in lines]

    async def receipt(self, job: Job) -> AttemptFinished | None:
        """The job's, which must be the only one; None if there is none yet."""
        found = [receipt for receipt in await self.receipts() if receipt.request_id == job.request_id]
        assert len(found) <= 1
        return found[0] if found else None

    async def _on_frame(self, msg: Message) -> None:
        _, nonce = subjects.frame_address(msg.subject)
        self.frames.setdefault(nonce, []).append(codec.decode_frame(msg.data))

    async def _on_presence(self, msg: Message) -> None:
        self.presence.append(codec.decode_presence(msg.data))
        self.presence_at.append(time.monotonic())


def job_for(**changes: Any) -> Job:
    return new_job({"stream": True}, **{"ingress": INGRESS, "route": ROUTE, **changes})


_decode_receipt = msgspec.json.Decoder(AttemptFinished).decode
