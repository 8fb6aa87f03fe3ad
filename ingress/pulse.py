"""Notices within a tenth of a second that a worker's connection is gone, while it owes us an answer.

Its tokens are its pulse. When none has come for a moment, the server is asked whether the worker still listens: a killed process
doesn't. A worker that merely reconnects is back after a few milliseconds, so one look is not believed; and what becomes of
one that seems gone is its streams' business: see `Relay.absent`. Only one that stays away is given up for good.
Source: docs/adr/0067-detection.md
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from bus.connection import BusUnavailable, Connection
from bus.listeners import Listeners
from ingress.relay import Switchboard
from schemas import subjects
from schemas.ids import WorkerId

log = structlog.get_logger()

LOOK_EVERY_S = 0.02
SILENT_S = 0.03  # since its last frame; then it is asked after
LOOKS = 2  # in a row that find nobody: then it counts as absent
IN_A_ROW_S = 0.25  # from one to the next, also where this process is late
GIVEN_UP_S = 2.0  # of absence
OWN_RETURN_S = 3.0  # after our own connection was away: the others are on their way back, too
ASKED_AT_ONCE_MAX = 500  # workers; with more, each is asked less often

Gone = Callable[[WorkerId], None]
Listens = Callable[[WorkerId], bool]


@dataclass(slots=True)
class _Missed:
    """Looks in a row that found nobody."""

    since: float
    looks: int = 0
    last_at: float = 0.0


class Pulse:
    """*listens* tells of a worker whether it can be asked after; *gone* is told of one that stays away."""

    def __init__(self, connection: Connection, switchboard: Switchboard, *, listens: Listens, gone: Gone) -> None:
        self._connection = connection
        self._switchboard = switchboard
        self._listens = listens
        self._gone = gone
        self._listeners = Listeners(connection, on_nobody=self._on_nobody)
        self._loop = asyncio.get_running_loop()
        self._missed: dict[WorkerId, _Missed] = {}
        self._from = 0.0
        self._turn = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._listeners.start()
        self._connection.on_reconnect(self._on_reconnect)
        self._task = asyncio.create_task(self._beat(), name="pulse")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _on_reconnect(self) -> None:
        self._missed.clear()
        self._from = self._loop.time() + OWN_RETURN_S

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            now = self._loop.time()
            if not self._connection.is_up or now < self._from:
                continue
            try:
                for worker in self._silent(now):
                    await self._listeners.ask(subjects.here(worker), name=worker)
            except BusUnavailable as error:
                log.debug("pulse_not_felt", error=error.message)

    def _silent(self, now: float) -> list[WorkerId]:
        """The workers that owe us something and say nothing; some of them, in turn, when they are many."""
        silent = [
            worker
            for worker, heard_at in self._switchboard.owing()
            if now - heard_at > SILENT_S and self._listens(worker)
        ]
        self._missed = {worker: self._missed[worker] for worker in silent if worker in self._missed}
        if len(silent) <= ASKED_AT_ONCE_MAX:
            return silent
        self._turn = (self._turn + ASKED_AT_ONCE_MAX) % len(silent)
        return (silent + silent)[self._turn : self._turn + ASKED_AT_ONCE_MAX]

    def _on_nobody(self, name: str) -> None:
        worker, now = WorkerId(name), self._loop.time()
        if now < self._from:
            return
        missed = self._missed.get(worker)
        if missed is None or now - missed.last_at > IN_A_ROW_S:
            missed = self._missed[worker] = _Missed(since=now)
        missed.looks, missed.last_at = missed.looks + 1, now
        if missed.looks == LOOKS:
            log.info("worker_absent", worker=worker)
        if missed.looks >= LOOKS:
            self._switchboard.miss(worker)
        if now - missed.since > GIVEN_UP_S:
            del self._missed[worker]
            self._gone(worker)
