"""Who is alive, and what they serve at what price: folded from presence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import msgspec
import structlog

from bus.connection import BusUnavailable, Connection, Message
from schemas import codec, subjects
from schemas.ids import RouteId, WorkerId
from schemas.jobs import PRESENCE_EVERY_S, PRESENCE_MISSED_MAX, Announce, Presence, WorkerState
from schemas.money import Price

log = structlog.get_logger()

SWEEP_EVERY_S = 0.5
QUIET_S = 0.1
GATHER_MAX_S = 1.0
LOST_AFTER_S = PRESENCE_EVERY_S * PRESENCE_MISSED_MAX
WORKERS_MAX = 100_000
NOBODY: AbstractSet[WorkerId] = frozenset()

Lost = Callable[[WorkerId], None]


class Fleet:
    """The workers that have been heard of lately. `offers` answers in one look-up: it is asked for every request."""

    def __init__(self, connection: Connection, *, lost_after_s: float = LOST_AFTER_S) -> None:
        self._connection = connection
        self._lost_after_s = lost_after_s
        self._heard: dict[WorkerId, tuple[Presence, float]] = {}
        self._offers: dict[str, dict[RouteId, Price]] = {}
        self._known: set[str] = set()  # every model that was ever offered, so that "not now" isn't "never"
        self._servers: dict[tuple[RouteId, str], set[WorkerId]] = {}
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

    def offers(self, model: str) -> dict[RouteId, Price]:
        """The live routes that serve *model*, each with the price its workers state."""
        return self._offers.get(model, {})

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
        before = self._heard.get(presence.worker)
        if before is None:
            if len(self._heard) >= WORKERS_MAX:
                log.warning("worker_ignored", worker=presence.worker, reason="too many workers")
                return
            log.info("worker_online", worker=presence.worker, routes=[offer.route for offer in presence.routes])
        self._heard[presence.worker] = (presence, self._loop.time())
        if before is None or _served(before[0]) != _served(presence):
            self._index()

    def _forget(self, worker: WorkerId, *, reason: str) -> None:
        if self._heard.pop(worker, None) is not None:
            log.info("worker_offline", worker=worker, reason=reason)
            self._index()
        for callback in self._lost:
            callback(worker)

    def _index(self) -> None:
        offers: dict[str, dict[RouteId, Price]] = {}
        servers: dict[tuple[RouteId, str], set[WorkerId]] = {}
        for presence, _ in self._heard.values():
            for route, model, price in _served(presence):
                offers.setdefault(model, {})[route] = price
                servers.setdefault((route, model), set()).add(presence.worker)
            self._known.update(model.name for offer in presence.routes for model in offer.models)
        self._offers, self._servers = offers, servers
        for callback in self._changed:
            callback()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            if not self._connection.is_up:
                continue  # silence is ours, not theirs
            now = self._loop.time()
            for worker in [w for w, (_, at) in self._heard.items() if now - at > self._lost_after_s]:
                self._forget(worker, reason="silent")


def _served(presence: Presence) -> list[tuple[RouteId, str, Price]]:
    if presence.state is not WorkerState.SERVING:
        return []
    return [
        (offer.route, model.name, model.price)
        for offer in presence.routes
        if offer.down is None
        for model in offer.models
    ]
