"""Stand-ins that are passed in where the ingress meets NATS: they do as told and remember what was asked of them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Raw

from bus.log import Appended
from ingress.chat import ChatCompletions
from ingress.exchange import Services
from ingress.fleet import Fleet
from ingress.receipts import Receipts
from ingress.relay import Relay, Switchboard
from ingress.router import Router
from schemas import codec
from schemas.control import AnyControlEvent, ControlState, KeyStated, Role
from schemas.errors import LogUnavailable, PenstockError
from schemas.events import Event, RequestFinished, RequestRejected
from schemas.frames import AnyFrame, Delta, Finished, Started
from schemas.ids import EventId, IngressId, KeyId, OrgId, RouteId, WorkerId
from schemas.jobs import Job, ModelOffer, Presence, RouteOffer, Timeouts, WorkerState
from schemas.money import Price, Usage
from schemas.settings import IngressSettings, RoutingSettings
from tests.waiting import eventually

KEY = "sk-test-0123456789abcdef"
MODEL = "m"
WORKER = WorkerId("worker-a")
INGRESS = IngressId("ingress-a")
BIG = 1 << 30
BODY = b'{"model":"m","messages":[{"role":"user","content":"hello there"}]}'
STREAM_BODY = BODY[:-1] + b',"stream":true}'


class Message:
    """What a subscription hands on."""

    def __init__(self, subject: str, data: bytes) -> None:
        self.subject = subject
        self.data = data


class Wall:
    """A connection that nobody answers on; what is said on it is remembered."""

    is_up = True
    max_payload = BIG

    def __init__(self) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.listeners: dict[str, Callable[[Any], Any]] = {}
        self.reconnected: list[Callable[[], Awaitable[None]]] = []

    @property
    def commands(self) -> list[tuple[str, Any]]:
        return [(subject, codec.decode_command(payload)) for subject, payload in self.said]

    async def say(self, subject: str, payload: bytes) -> None:
        self.said.append((subject, payload))

    async def listen(self, subject: str, on_message: Callable[[Any], Awaitable[None]]) -> None:
        self.listeners[subject] = on_message

    async def hear(self, subject: str, on_message: Callable[[Any], None]) -> None:
        self.listeners[subject] = on_message

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self.reconnected.append(callback)


class Log:
    """An event log whose disk is the test's: what is appended is durable while ``open`` is set, or fails if it is broken."""

    producer = "ingress-a"
    fenced = False

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.open = asyncio.Event()
        self.open.set()
        self.broken = False
        self.sent = False  # whether what waits is on its way
        self._waiting: dict[Appended, Event] = {}

    def append(self, event: Event) -> Appended:
        self.events.append(event)
        appended = Appended()
        self._waiting[appended] = event
        waiting = asyncio.ensure_future(self._wait())
        waiting.add_done_callback(lambda _: self._settle(appended, waiting.exception()))
        return appended

    def _settle(self, appended: Appended, error: BaseException | None) -> None:
        if self._waiting.pop(appended, None) is None:
            return  # withdrawn
        appended.stored = error is None
        if not appended.done():
            appended.set_result(None) if error is None else appended.set_exception(error)

    def withdraw(self, appended: Appended) -> bool:
        if self.sent:
            return False
        self.events.remove(self._waiting.pop(appended))
        return True

    def note(self, event: Event, *, within_s: float = 0.0) -> None:  # noqa: ARG002
        self.events.append(event)

    async def record(self, event: Event, *, within_s: float) -> None:
        await self.durable(self.append(event), within_s=within_s)

    async def durable(self, appended: asyncio.Future[None], *, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                await appended
        except TimeoutError as error:
            raise LogUnavailable from error

    async def flush(self) -> None:
        await self.open.wait()
        await turns()

    async def _wait(self) -> None:
        await self.open.wait()
        if self.broken:
            raise LogUnavailable

    def kinds(self) -> list[str]:
        return [str(event.__struct_config__.tag) for event in self.events]

    @property
    def finished(self) -> RequestFinished:
        (event,) = [event for event in self.events if isinstance(event, RequestFinished)]
        return event

    @property
    def rejected(self) -> RequestRejected:
        (event,) = [event for event in self.events if isinstance(event, RequestRejected)]
        return event


class Queue:
    """A job queue whose other end is the test."""

    def __init__(self) -> None:
        self.is_up = True
        self.jobs: list[Job] = []
        self.withdrawn: list[int] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: PenstockError | None = None

    async def publish(self, job: Job) -> int:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.jobs.append(job)
        return len(self.jobs)

    async def withdraw(self, seq: int) -> bool:
        self.withdrawn.append(seq)
        return True


class Control:
    def __init__(self) -> None:
        self.state = ControlState()
        self.changed: list[Callable[[Any], None]] = []
        self.state.apply(
            KeyStated(
                id=EventId("e"),
                ts_ns=1,
                by="test",
                producer="test",
                key_id=KeyId("key_1"),
                org=OrgId("default"),
                role=Role.CLIENT,
                hash=hashlib.sha256(KEY.encode()).hexdigest(),
                created_ns=1,
            )
        )

    def on_change(self, callback: Callable[[Any], None]) -> None:
        self.changed.append(callback)

    def say(self, event: AnyControlEvent) -> None:
        self.state.apply(event)
        for callback in self.changed:
            callback(event)


def presence(worker: WorkerId = WORKER, *, routes: tuple[str, ...] = ("r1",), **changes: Any) -> Presence:
    models = (ModelOffer(name=MODEL, price=Price(input=10, output=100)),)
    offers = tuple(RouteOffer(route=RouteId(r), provider="p", models=models, slots=2, free=2) for r in routes)
    return Presence(**{"worker": worker, "state": WorkerState.SERVING, "routes": offers, **changes})


class Client:
    """One HTTP client at the ASGI boundary: the test sends and leaves, and sees what is sent back."""

    def __init__(self, body: bytes = BODY, *, whole: bool = True) -> None:
        self._coming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.writable = asyncio.Event()
        self.writable.set()
        self.cut = False
        self.part(body, more=not whole)

    def part(self, body: bytes, *, more: bool) -> None:
        self._coming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self, *, unstuck: bool = True) -> None:
        if unstuck:
            self.writable.set()
        self._coming.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> dict[str, Any]:
        return await self._coming.get()

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        self.sent.append(message)

    def cut_off(self) -> None:
        self.cut = True
        self.leave()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def is_over(self) -> bool:
        return bool(self.sent) and self.sent[-1].get("more_body") is False


async def turns(count: int = 20) -> None:
    """Lets everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


class Bench:
    """The chat endpoint with doubles around it."""

    def __init__(
        self,
        *,
        routes: tuple[str, ...] = ("r1",),
        timeouts: Timeouts | None = None,
        settings: IngressSettings | None = None,
        max_bytes: int = BIG,
        keep_alive_comment_s: float = 60.0,
        receipts: Receipts | None = None,
    ) -> None:
        self.log, self.queue, self.wall = Log(), Queue(), Wall()
        self.switchboard = Switchboard(self.wall, ingress=INGRESS, max_bytes_per_relay=max_bytes)  # type: ignore[arg-type]
        self.fleet = Fleet(self.wall)  # type: ignore[arg-type]
        self.fleet.on_lost(self.switchboard.lose)
        self.fleet.on_changed(self.switchboard.rouse_waiting)
        self.tasks: set[asyncio.Future[None]] = set()  # that the server's drain would wait for
        self._routes = routes
        control = Control()
        services = Services(
            ingress=INGRESS,
            log=self.log,  # type: ignore[arg-type]
            refusals=self.log,  # type: ignore[arg-type]
            queue=self.queue,  # type: ignore[arg-type]
            switchboard=self.switchboard,
            router=Router(self.fleet, control, RoutingSettings()),  # type: ignore[arg-type]
            timeouts=timeouts or Timeouts(),
            keep_alive_comment_s=keep_alive_comment_s,
            receipts=receipts,
        )
        self.chat = ChatCompletions(
            services,
            control=control,  # type: ignore[arg-type]
            settings=settings or IngressSettings(),
        )

    async def serve(
        self, client: Client, *, key: str = KEY, method: str = "POST", headers: dict[str, str] | None = None
    ) -> asyncio.Task[None]:
        """Begins to serve *client*."""
        await self.fleet._on_presence(Message("presence.x", codec.encode(presence(routes=self._routes))))  # type: ignore[arg-type]
        scope = {
            "type": "http",
            "method": method,
            "path": "/v1/chat/completions",
            "headers": [
                (b"authorization", f"Bearer {key}".encode()),
                *((name.lower().encode(), value.encode()) for name, value in (headers or {}).items()),
            ],
            "state": {"penstock.cut": client.cut_off, "penstock.tasks": self.tasks},
        }
        return asyncio.create_task(self.chat(scope, client.receive, client.send))

    async def job(self, number: int = 1) -> Job:
        """The *number*-th job that was published."""
        await eventually(lambda: len(self.queue.jobs) >= number, what=f"job {number}", every_s=0)
        return self.queue.jobs[number - 1]

    async def serve_until_recorded(
        self, client: Client, *, headers: dict[str, str] | None = None
    ) -> asyncio.Task[None]:
        """Serves *client* as far as its closing event, of an answer of one token, which waits for a log that is away."""
        task = await self.serve(client, headers=headers)
        job = await self.job()
        self.start(job)
        await turns()
        self.log.open.clear()
        self.finish(job, 1, text="a")
        await eventually(lambda: "request.finished" in self.log.kinds(), every_s=0)
        return task

    def relay(self, job: Job) -> Relay:
        return self.switchboard._relays[job.nonce]

    def start(self, job: Job, *, worker: WorkerId = WORKER) -> None:
        self.feed(job, Started(request_id=job.request_id, epoch=job.epoch, seq=0, worker=worker), worker=worker)

    def say(self, job: Job, seq: int, *texts: str) -> None:
        chunks = tuple(Raw(b'{"choices":[{"index":0,"delta":{"content":"%b"}}]}' % text.encode()) for text in texts)
        self.feed(job, Delta(request_id=job.request_id, epoch=job.epoch, seq=seq, chunks=chunks, tokens=len(texts)))

    def role(self, job: Job, seq: int) -> None:
        """What opens an answer and says nothing."""
        chunk = Raw(b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}')
        self.feed(job, Delta(request_id=job.request_id, epoch=job.epoch, seq=seq, chunks=(chunk,)))

    def finish(
        self, job: Job, seq: int, *, text: str | None = None, worker: WorkerId = WORKER, usage: Usage | None = None
    ) -> None:
        message = Raw(
            b'{"choices":[{"index":0,"message":{"role":"assistant","content":"%b"}}]}' % (text or "").encode()
        )
        frame = Finished(
            request_id=job.request_id,
            epoch=job.epoch,
            seq=seq,
            chunks=() if text is None else (message,),
            tokens=0 if text is None else 1,
            usage=usage,
            finish_reason="stop",
        )
        self.feed(job, frame, worker=worker)

    def feed(self, job: Job, frame: AnyFrame, *, worker: WorkerId = WORKER, size: int = 1) -> None:
        self.relay(job).feed(frame, size, worker=worker)
