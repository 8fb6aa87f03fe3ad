"""Who is alive, what they serve at what price, and how busy they are: folded from presence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import msgspec
import structlog

from bus.connection import BusUnavailable, Connection, Message
from bus.presence import STOOD_STILL_S
from schemas import codec, subjects
from schemas.ids import RouteId, WorkerId
from schemas.jobs import (
    PRESENCE_EVERY_S,
    PRESENCE_MISSED_MAX,
    Announce,
    ModelOffer,
    Presence,
    RouteOffer,
    WorkerState,
)
from schemas.money import Price

log = structlog.get_logger()

SWEEP_EVERY_S = 0.5
QUIET_S = 0.1
GATHER_MAX_S = 1.0
LOST_AFTER_S = PRESENCE_EVERY_S * PRESENCE_MISSED_MAX
WORKERS_MAX = 100_000
NOBODY: AbstractSet[WorkerId] = frozenset()
MODELS_MAX = 100_000  # that are remembered when nobody serves them any more

UNKNOWN_QUANTISATION = "unknown"

Lost = Callable[[WorkerId], None]


@dataclass(frozen=True, slots=True)
class Serving:
    """A worker that serves a model on a route, with so many free slots when it last said."""

    worker: WorkerId
    route: RouteId
    free: int
    offer: ModelOffer
    waits: bool = False  # it keeps a job until it has a slot
    born_ns: int = 0  # UTC, when its process began: with the same name it may be another one


@dataclass(frozen=True, slots=True)
class Offer:
    """What the live workers of a route say of a model there. Where they differ, what holds for all of them."""

    provider: str
    price: Price
    own: bool | None  # None: they don't tell
    quantisations: frozenset[str]
    parameters: frozenset[str] | None

    def beside(self, other: Offer) -> Offer:
        """With *other*, of another worker of the same route: any of them may get the job."""
        parameters = None
        if self.parameters is not None and other.parameters is not None:
            parameters = self.parameters & other.parameters
        own = None if self.own is None or other.own is None else self.own and other.own
        return Offer(other.provider, other.price, own, self.quantisations | other.quantisations, parameters)


@dataclass(slots=True)
class Load:
    """Of a route, at all its workers: *begun* by this ingress (less those that ended) since one of them last told."""

    slots: int = 0
    free: int = 0
    running: int = 0  # of this ingress
    begun: int = 0
    workers: int = 0
    held: int = 0  # workers that let jobs wait for a while
    why_held: str = ""

    @property
    def taken(self) -> int:
        """How many slots are, as far as can be known here: what others began since isn't."""
        return max(self.slots - self.free + self.begun, self.running, 0)

    def tell(self, offer: RouteOffer, *, sign: int, serves: bool) -> None:
        """A worker says this (*sign* 1), or doesn't any more (-1). One that takes no jobs has no slots."""
        self.begun = 0
        if serves:
            self.workers += sign
            self.slots += sign * offer.slots
            self.free += sign * offer.free
        if serves and offer.held is not None:
            self.held += sign
            self.why_held = offer.held

    @property
    def is_held(self) -> bool:
        """Whether all its workers let jobs wait: the account's limits are used up."""
        return 0 < self.workers <= self.held


class Fleet:
    """The workers that have been heard of lately. `offers` answers in one look-up: it is asked for every request.

    *version* changes whenever an offer does.
    """

    def __init__(self, connection: Connection, *, lost_after_s: float = LOST_AFTER_S) -> None:
        self._connection = connection
        self._lost_after_s = lost_after_s
        self._heard: dict[WorkerId, tuple[Presence, float]] = {}
        self._former: dict[WorkerId, int] = {}  # of those in `_heard`: when the process began that had the name before
        self.version = 0
        self._offers: dict[str, dict[RouteId, Offer]] = {}
        # Whatever was ever offered, so that "not now" isn't "never": model -> route -> its last offer.
        self._known: dict[str, dict[RouteId, Offer]] = {}
        self._servers: dict[tuple[RouteId, str], set[WorkerId]] = {}
        self._loads: dict[RouteId, Load] = {}
        self._lost: list[Lost] = []
        self._changed: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._connection.listen(subjects.ALL_PRESENCE, self._on_presence)
        self._connection.on_reconnect(self._on_reconnect)
        self._sweeper = asyncio.create_task(self._sweep(), name="fleet-sweep")
        await self._ask()

    async def gather(self) -> None:
        """Returns when those who were asked at the start have had time to answer: a process that begins knows no model before.

        That is `QUIET_S` after the last answer, or `GATHER_MAX_S` if nobody is there.
        """
        until = self._loop.time() + GATHER_MAX_S
        while (now := self._loop.time()) < until:
            newest = max((at for _, at in self._heard.values()), default=None)
            if newest is not None and now - newest >= QUIET_S:
                return
            await asyncio.sleep(QUIET_S / 4)

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    def on_lost(self, callback: Lost) -> None:
        self._lost.append(callback)

    def on_changed(self, callback: Callable[[], None]) -> None:
        """*callback* is called when other workers serve, or others models, than before."""
        self._changed.append(callback)

    def servers(self, route: RouteId, model: str) -> AbstractSet[WorkerId]:
        """The workers that serve *model* on *route* now."""
        return self._servers.get((route, model), NOBODY)

    def offers(self, model: str) -> dict[RouteId, Offer]:
        """The live routes that serve *model*, and how."""
        return self._offers.get(model, {})

    def away(self, model: str) -> dict[RouteId, Offer]:
        """The routes that served *model* once and don't now, and how they did."""
        live = self.offers(model)
        return {route: offer for route, offer in self._known.get(model, {}).items() if route not in live}

    def names(self) -> set[str]:
        """Every route that was ever heard of, and every provider."""
        known = [(route, offer.provider) for offers in self._known.values() for route, offer in offers.items()]
        return {name for names in known for name in names}

    def load(self, route: RouteId) -> Load:
        """Of a route that somebody serves; whoever begins or ends an attempt there notes it in it."""
        load = self._loads.get(route)
        if load is None:
            load = self._loads[route] = Load()
        return load

    def listens(self, worker: WorkerId) -> bool:
        """Whether *worker* says that it listens to `here.<worker>`."""
        heard = self._heard.get(worker)
        return heard is not None and heard[0].listens

    def gone(self, worker: WorkerId) -> None:
        """*worker*'s connection has been away for too long."""
        self._forget(worker, reason="disconnected")

    def offer(self, model: str, *, worker: WorkerId, route: RouteId) -> ModelOffer | None:
        """What *worker* says of *model* on *route*."""
        heard = self._heard.get(worker)
        offers = () if heard is None else heard[0].routes
        return next((m for offer in offers if offer.route == route for m in offer.models if m.name == model), None)

    def serving(self, model: str) -> list[Serving]:
        """Everybody who serves *model* now. Asked only when an answer begins or breaks off: it looks at every worker."""
        return [
            Serving(presence.worker, offer.route, offer.free, offered, presence.waits, presence.started_ns)
            for presence, _ in self._heard.values()
            if presence.state is WorkerState.SERVING
            for offer in presence.routes
            if offer.down is None
            for offered in offer.models
            if offered.name == model
        ]

    def born_ns(self, worker: WorkerId) -> int | None:
        """When the process of *worker* began; None if it is gone, or about to go."""
        heard = self._heard.get(worker)
        return None if heard is None or heard[0].state is not WorkerState.SERVING else heard[0].started_ns

    def with_room(self, route: RouteId, model: str) -> list[tuple[WorkerId, int]]:
        """The workers that had free slots for *model* on *route* when they last said, and how many; of those that can be asked."""
        found = [(worker, self._heard[worker][0]) for worker in self.servers(route, model)]
        return [
            (worker, offer.free)
            for worker, presence in found
            if presence.waits
            for offer in presence.routes
            if offer.route == route and offer.free > 0 and offer.held is None
        ]

    def models(self) -> list[str]:
        return sorted(self._offers)

    def knows(self, model: str) -> bool:
        return model in self._known

    def why_not(self, model: str) -> str | None:
        """Why a worker that has *model* takes no jobs for it at the moment; asked only for a model without offers."""
        return next(
            (
                offer.down
                for presence, _ in self._heard.values()
                for offer in presence.routes
                if offer.down is not None and any(offered.name == model for offered in offer.models)
            ),
            None,
        )

    def workers(self) -> list[Presence]:
        return [presence for presence, _ in self._heard.values()]

    async def _on_reconnect(self) -> None:
        """What was not heard while the connection was away is no silence: everybody has their full time again."""
        now = self._loop.time()
        self._heard = {worker: (presence, now) for worker, (presence, _) in self._heard.items()}
        await self._ask()

    async def _ask(self) -> None:
        """Asks all workers to announce themselves, instead of waiting for their next beat."""
        try:
            await self._connection.say(subjects.EVERY_WORKER, codec.encode(Announce()))
        except BusUnavailable as error:
            log.debug("announce_not_asked", error=error.message)

    async def _on_presence(self, msg: Message) -> None:
        try:
            presence = codec.decode_presence(msg.data)
        except msgspec.MsgspecError:
            log.warning("presence_unreadable", subject=msg.subject)
            return
        if presence.state is WorkerState.GONE:
            self._forget(presence.worker, reason="gone")
            return
        former = self._heard.get(presence.worker)
        if former is not None and self._is_another(former[0], presence):
            self._forget(presence.worker, reason="started_again")
            self._former[presence.worker] = former[0].started_ns
        before = self._heard.get(presence.worker)
        if before is None:
            if len(self._heard) >= WORKERS_MAX:
                log.warning("worker_ignored", worker=presence.worker, reason="too many workers")
                return
            log.info("worker_online", worker=presence.worker, routes=[offer.route for offer in presence.routes])
        self._heard[presence.worker] = (presence, self._loop.time())
        self._weigh(None if before is None else before[0], presence)
        if before is None or not _offers_the_same(before[0], presence):
            self._index()

    def _is_another(self, before: Presence, now: Presence) -> bool:
        """Whether the worker's process isn't the one that was heard before under its name: that one was killed and started again.

        Two that have one name at the same time, which they should not, speak in turns: neither is taken for dead for that.
        """
        if before.started_ns == now.started_ns:
            return False
        if self._former.get(now.worker) != now.started_ns:
            return True
        self._former[now.worker] = before.started_ns
        return False

    def _forget(self, worker: WorkerId, *, reason: str) -> None:
        heard = self._heard.pop(worker, None)
        self._former.pop(worker, None)
        if heard is not None:
            log.info("worker_offline", worker=worker, reason=reason)
            self._weigh(heard[0], None)
            self._index()
        for callback in self._lost:
            callback(worker)

    def _weigh(self, before: Presence | None, now: Presence | None) -> None:
        """Puts what a worker says of its slots in place of what it said before."""
        for presence, sign in ((before, -1), (now, 1)):
            for offer in () if presence is None else presence.routes:
                self.load(offer.route).tell(offer, sign=sign, serves=_serves(presence, offer))
        for offer in () if before is None or now is not None else before.routes:
            load = self.load(offer.route)
            if load.workers == 0 and load.running == 0:
                del self._loads[offer.route]

    def _index(self) -> None:
        offers: dict[str, dict[RouteId, Offer]] = {}
        servers: dict[tuple[RouteId, str], set[WorkerId]] = {}
        for presence, _ in self._heard.values():
            for route in presence.routes:
                for model in route.models:
                    offer = _offer(route, model)
                    self._know(route.route, model.name, offer)
                    if _serves(presence, route):
                        routes = offers.setdefault(model.name, {})
                        known = routes.get(route.route)
                        routes[route.route] = offer if known is None else known.beside(offer)
                        servers.setdefault((route.route, model.name), set()).add(presence.worker)
        self._offers, self._servers = offers, servers
        self.version += 1
        for callback in self._changed:
            callback()

    def _know(self, route: RouteId, model: str, offer: Offer) -> None:
        if model in self._known or len(self._known) < MODELS_MAX:
            self._known.setdefault(model, {})[route] = offer

    async def _sweep(self) -> None:
        swept_at = self._loop.time()
        deaf = False
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now, before, was_deaf = self._loop.time(), swept_at, deaf
            swept_at, deaf = now, not self._connection.is_up
            if deaf:
                continue  # silence is ours, not theirs
            if was_deaf:  # it is up some time before a reconnect is told of
                await self._on_reconnect()
                continue
            if now - before > SWEEP_EVERY_S + STOOD_STILL_S:  # what was said meanwhile is still to be heard
                log.info("stood_still", for_s=round(now - before, 1))
                await self._on_reconnect()
                continue
            for worker in [w for w, (_, at) in self._heard.items() if now - at > self._lost_after_s]:
                self._forget(worker, reason="silent")


def _serves(presence: Presence | None, offer: RouteOffer) -> bool:
    return presence is not None and presence.state is WorkerState.SERVING and offer.down is None


def _offers_the_same(before: Presence, now: Presence) -> bool:
    """In all but the numbers, which change at every beat."""
    if before.state is not now.state or len(before.routes) != len(now.routes):
        return False
    return all(
        (one.route, one.provider, one.down, one.own, one.parameters, one.models)
        == (other.route, other.provider, other.down, other.own, other.parameters, other.models)
        for one, other in zip(before.routes, now.routes, strict=True)
    )


def _offer(route: RouteOffer, model: ModelOffer) -> Offer:
    quantisation = model.fingerprint.quantisation if model.fingerprint is not None else None
    return Offer(
        provider=route.provider,
        price=model.price,
        own=route.own,
        quantisations=frozenset({(quantisation or UNKNOWN_QUANTISATION).lower()}),
        parameters=None if route.parameters is None else frozenset(route.parameters),
    )
