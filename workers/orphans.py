"""Attempts whose ingress is gone: nobody will read what they generate, and somebody would pay for it.

A killed process's connection ends with it, so nobody listens any more where it was. One that only stands still keeps its
connection, and is waited for, as long as the ledger would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog

from bus.connection import Connection
from bus.presence import Roll
from schemas.ids import IngressId
from schemas.jobs import PRESENCE_EVERY_S, Job

log = structlog.get_logger()

LOOK_EVERY_S = 1.0
DOUBTED_AFTER_S = 1.5 * PRESENCE_EVERY_S  # of silence: then it is looked whether anybody listens
ABSENT_MAX = 2  # such looks in a row that find nobody; a connection that broke is back after one
LOST_AFTER_S = 15.0  # of silence, though somebody listens


class Served(NamedTuple):
    """An attempt under way. *began* is monotonic seconds."""

    job: Job
    began: float


class Orphans:
    """*running* tells what runs; *stop* stops all of it that is an ingress's."""

    def __init__(
        self, connection: Connection, running: Callable[[], Iterable[Served]], stop: Callable[[IngressId], None]
    ) -> None:
        self._roll = Roll(connection)
        self._running = running
        self._stop = stop
        self._absent: dict[IngressId, int] = {}  # how often in a row nobody listened
        self._looking: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        await self._roll.start()
        self._looking = asyncio.create_task(self._look_regularly(), name="orphans")

    async def stop(self) -> None:
        self._stopping = True  # in Python 3.11 a cancellation can be lost that meets an answer just as it comes
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._roll.stop()

    def is_one(self, job: Job) -> bool:
        """Whether *job*, which has waited in the queue, comes from an ingress that was there and has fallen silent since."""
        return job.announced and self._roll.has_heard(job.ingress) and self._roll.silent_s(job.ingress) > LOST_AFTER_S

    async def _look_regularly(self) -> None:
        while not self._stopping:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._look()
            except Exception:  # the next look is taken all the same
                log.exception("look_broke")

    async def _look(self) -> None:
        oldest: dict[IngressId, float] = {}
        for job, began in self._running():
            if job.announced:
                oldest[job.ingress] = min(began, oldest.get(job.ingress, began))
        doubted = {ingress for ingress, began in oldest.items() if self._silent_s(ingress, began) > DOUBTED_AFTER_S}
        self._absent = {ingress: self._absent.get(ingress, 0) for ingress in doubted}
        for ingress in doubted:
            if await self._is_gone(ingress, oldest[ingress]):
                log.warning("ingress_gone", ingress=ingress)
                self._stop(ingress)

    async def _is_gone(self, ingress: IngressId, began: float) -> bool:
        if self._silent_s(ingress, began) > LOST_AFTER_S:
            return True
        self._absent[ingress] = 0 if await self._roll.is_listening(ingress) else self._absent[ingress] + 1
        return self._absent[ingress] >= ABSENT_MAX

    def _silent_s(self, ingress: IngressId, began: float) -> float:
        return self._roll.silent_s(ingress, since=began)
