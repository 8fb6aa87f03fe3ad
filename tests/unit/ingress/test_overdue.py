"""Jobs that the queue gave to a silent worker are offered to one that speaks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from ingress.overdue import AGAIN_S, AT_ONCE_MAX, OVERDUE_S, Overdue
from ingress.policy.routing import Leg
from schemas.ids import RouteId, WorkerId, new_nonce
from schemas.jobs import Job
from schemas.money import Price
from tests.factories import new_job

LEG = Leg(RouteId("r"), "m", Price())
SILENT, AWAKE = WorkerId("a-silent"), WorkerId("b-awake")


@dataclass(eq=False)
class Attempt:
    job: Job = field(default_factory=lambda: new_job(nonce=new_nonce()))
    leg: Leg = LEG
    worker: WorkerId | None = None
    asked: set[WorkerId] = field(default_factory=set)
    times: int = 0

    def ask(self, workers: Iterable[WorkerId]) -> None:
        self.asked.update(workers)
        self.times += 1


@dataclass
class Fleet:
    room: list[tuple[WorkerId, int]] = field(default_factory=list)

    def with_room(self, route: RouteId, model: str) -> list[tuple[WorkerId, int]]:
        return self.room if (route, model) == ("r", "m") else []


async def overdue(*room: tuple[WorkerId, int], attempts: int = 1) -> tuple[Overdue, list[Attempt], Fleet]:
    """So many attempts that have waited too long already."""
    fleet = Fleet(list(room))
    made = Overdue(fleet)  # type: ignore[arg-type]
    waiting = [Attempt() for _ in range(attempts)]
    for attempt in waiting:
        made.waits(attempt)
    made.look()
    assert not any(attempt.times for attempt in waiting)
    await asyncio.sleep(OVERDUE_S + 0.01)
    return made, waiting, fleet


async def test_a_job_that_waits_beside_a_free_slot_is_offered_to_its_worker() -> None:
    made, (attempt,), fleet = await overdue()
    made.look()
    assert attempt.times == 0
    fleet.room.append((AWAKE, 1))
    made.look()
    made.look()
    assert (attempt.times, attempt.asked) == (1, {AWAKE})


async def test_who_does_not_begin_it_is_not_asked_a_second_time_while_there_is_another() -> None:
    made, (attempt,), _ = await overdue((SILENT, 1), (AWAKE, 1))
    made.look()
    assert attempt.asked == {SILENT}
    await asyncio.sleep(AGAIN_S + 0.01)
    made.look()
    assert attempt.asked == {SILENT, AWAKE}


async def test_no_worker_is_offered_more_than_it_has_room_for() -> None:
    made, attempts, _ = await overdue((SILENT, 1), (AWAKE, 2), attempts=5)
    made.look()
    assert [sorted(attempt.asked) for attempt in attempts] == [[SILENT], [AWAKE], [AWAKE], [], []]


async def test_one_look_offers_a_bounded_number() -> None:
    made, attempts, _ = await overdue((AWAKE, 1000), attempts=3 * AT_ONCE_MAX)
    made.look()
    assert sum(attempt.times for attempt in attempts) == AT_ONCE_MAX
    made.look()
    assert sum(attempt.times for attempt in attempts) == 2 * AT_ONCE_MAX


async def test_what_has_begun_or_is_over_is_not_offered_nor_is_a_job_to_whom_it_failed_at() -> None:
    made, (begun, over, failed), _ = await overdue((AWAKE, 9), attempts=3)
    begun.worker = SILENT
    made.left(over)
    made.left(over)
    failed.job = new_job(nonce=new_nonce(), not_workers=(AWAKE,))
    made.look()
    assert [each.times for each in (begun, over, failed)] == [0, 0, 0]
    made.left(begun)
    made.left(failed)
    assert not made._waiting
