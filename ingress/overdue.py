"""Jobs that nobody has begun although somebody has a free slot: the queue gave them to a worker that says nothing.

A worker whose machine vanishes leaves its pulls behind in the server, which hands jobs to them until they expire, and takes each
back only after `ack_wait`. A worker with a free slot is asking for jobs all the time, so what waits beside one was swallowed.
It is offered to that worker directly, under the same nonce: should the silent one speak after all, one of the two is told to stop.
Source: docs/adr/0078-silent-pulls.md
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import structlog

from ingress.fleet import Fleet
from ingress.policy.routing import Leg
from schemas.ids import RouteId, WorkerId
from schemas.jobs import Job

log = structlog.get_logger()

LOOK_EVERY_S = 0.1
OVERDUE_S = 0.3  # in the queue; a free worker begins in milliseconds
AGAIN_S = 0.3  # from one offer of a job to the next
AT_ONCE_MAX = 8  # jobs of a route and a model that are offered in one look

Place = tuple[RouteId, str]


class Waiting(Protocol):
    """An attempt whose job is in the queue."""

    job: Job
    leg: Leg

    @property
    def worker(self) -> WorkerId | None: ...

    @property
    def asked(self) -> set[WorkerId]: ...

    def ask(self, workers: Iterable[WorkerId]) -> None: ...


class Overdue:
    """The attempts of this ingress that wait in the queue, by place, those that wait longest first."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._waiting: dict[Place, dict[Waiting, float]] = {}  # and when each is to be offered
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._looking = asyncio.create_task(self._look_regularly(), name="overdue")

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    def waits(self, attempt: Waiting) -> None:
        self._waiting.setdefault(_place(attempt), {})[attempt] = self._loop.time() + OVERDUE_S

    def left(self, attempt: Waiting) -> None:
        """*attempt* has begun, or is over."""
        here = self._waiting.get(_place(attempt))
        if here is not None and here.pop(attempt, None) is not None and not here:
            del self._waiting[_place(attempt)]

    def look(self) -> None:
        """Offers what is overdue to those who had room when they last said."""
        now = self._loop.time()
        for (route, model), here in self._waiting.items():
            if next(iter(here.values())) > now:
                continue
            room = Counter(dict(self._fleet.with_room(route, model)))
            late = [attempt for attempt, at in here.items() if at <= now] if room else []
            for attempt in late[:AT_ONCE_MAX]:
                del here[attempt]
                here[attempt] = now + AGAIN_S  # at the end: it is the last to be offered again
                _offer(attempt, room)

    async def _look_regularly(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()


def _place(attempt: Waiting) -> Place:
    return attempt.leg.route, attempt.leg.model


def _offer(attempt: Waiting, room: Counter[WorkerId]) -> None:
    """Offers *attempt* to a worker with *room* that was not asked yet: the silent one may look as if it had some, too."""
    job = attempt.job
    fit = [worker for worker, free in room.items() if free > 0 and worker not in job.not_workers]
    if attempt.worker is not None or not fit:
        return
    worker = min(fit, key=attempt.asked.__contains__)
    room[worker] -= 1
    log.debug("job_overdue", request_id=job.request_id, epoch=job.epoch, worker=worker)
    attempt.ask((worker,))
