"""Jobs that come to a worker directly: an answer goes on before all that is in the queue, and no slot is promised twice."""

from __future__ import annotations

import asyncio

from schemas.frames import Delta, Finished, Started, Yielded
from schemas.ids import WorkerId
from schemas.jobs import Cancel, Continuation, Job, Take
from tests.integration.workers.conftest import Hire
from tests.integration.workers.rig import Desk, Fake, Station, job_for, waits_for
from tests.waiting import eventually

LONG_S = 30.0


def goes_on(*, accepted_ns: int = 1) -> Job:
    return job_for(continuation=Continuation(text="x", tokens=1), accepted_ns=accepted_ns)


async def give(desk: Desk, station: Station, job: Job, *, wait_s: float = 0.0) -> None:
    await desk.command(station.worker.id, Take(job=job, wait_s=wait_s))


async def has_heard(desk: Desk, station: Station) -> None:
    """What was said to a worker without room before has arrived: it says no to one more."""
    job = goes_on()
    await give(desk, station, job)
    await eventually(lambda: desk.kinds(job) == [Yielded])


async def full(hire: Hire, desk: Desk, gate: asyncio.Event) -> tuple[Station, Job]:
    """A worker whose only slot is taken."""
    station = await hire(provider=Fake(waits_for(gate)), slots=1)
    job = await desk.publish()
    await eventually(lambda: Started in desk.kinds(job))
    return station, job


async def test_a_slot_that_is_lent_is_not_asked_for_in_the_queue(hire: Hire, desk: Desk) -> None:
    """Its pull was at the server already: that job goes back once, and not round and round."""
    gate = asyncio.Event()
    station = await hire(provider=Fake(waits_for(gate)), slots=2)
    given = [goes_on(), goes_on()]
    for job in given:
        await give(desk, station, job)
    await eventually(lambda: all(Started in desk.kinds(job) for job in given))
    queued = await desk.publish_many(4)
    await eventually(lambda: station.credit == 0 and all(puller._asked <= 0 for puller in station.pullers))
    deliveries = sum(puller._subscriptions[-1].delivered for puller in station.pullers)
    await asyncio.sleep(0.3)
    assert sum(puller._subscriptions[-1].delivered for puller in station.pullers) == deliveries
    gate.set()
    await eventually(lambda: desk.all_done([*given, *queued]), timeout_s=LONG_S)
    await eventually(lambda: station.idle)
    assert station.credit == 2
    assert station.provider.most == 2


async def test_an_answer_on_standby_goes_on_before_what_is_in_the_queue(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station, first = await full(hire, desk, gate)
    queued = await desk.publish_many(3)
    young, old = goes_on(accepted_ns=2), goes_on(accepted_ns=1)
    for job in (young, old):
        await give(desk, station, job, wait_s=LONG_S)
    await has_heard(desk, station)
    assert desk.of(young) == desk.of(old) == []
    gate.set()
    await eventually(lambda: desk.all_done([first, young, old, *queued]), timeout_s=LONG_S)
    assert station.provider.taken[:3] == [first.nonce, old.nonce, young.nonce]
    await eventually(lambda: station.idle)
    assert station.credit == 1


async def test_who_needs_no_slot_any_more_stands_by_no_longer(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station, first = await full(hire, desk, gate)
    cancelled, late, stays = goes_on(), goes_on(), goes_on()
    await give(desk, station, cancelled, wait_s=LONG_S)
    await give(desk, station, late, wait_s=0.05)
    await give(desk, station, stays, wait_s=LONG_S)
    await desk.command(station.worker.id, Cancel(nonce=cancelled.nonce))
    await has_heard(desk, station)
    await asyncio.sleep(0.05)  # until the second one's time is over
    gate.set()
    await eventually(lambda: desk.all_done([first, stays]))
    assert desk.of(cancelled) == desk.of(late) == []
    await eventually(lambda: station.idle)
    assert station.credit == 1


async def test_without_time_to_wait_a_full_worker_says_so(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station, _ = await full(hire, desk, gate)
    await has_heard(desk, station)
    gate.set()


async def test_a_job_that_has_not_begun_is_begun_at_once_or_left_to_the_queue(hire: Hire, desk: Desk) -> None:
    """It is offered beside the queue. Who failed at it, and who is full, says nothing at all."""
    gate = asyncio.Event()
    station, first = await full(hire, desk, gate)
    offered = job_for()
    await give(desk, station, offered, wait_s=LONG_S)
    await has_heard(desk, station)
    gate.set()
    await eventually(lambda: desk.is_done(first) and station.idle)
    assert desk.of(offered) == []
    unwanted = job_for(not_workers=(WorkerId(station.worker.id),))
    await give(desk, station, unwanted, wait_s=LONG_S)
    await give(desk, station, offered, wait_s=LONG_S)
    await eventually(lambda: desk.is_done(offered))
    assert desk.of(unwanted) == []
    assert [type(frame) for frame in desk.of(offered)] in ([Started, Delta, Finished], [Started, Finished])


async def test_who_stands_by_begins_when_the_route_is_up_again(hire: Hire, desk: Desk) -> None:
    station = await hire(slots=1)
    station.provider.tell("the engine died")
    job = goes_on()
    await give(desk, station, job, wait_s=LONG_S)
    await has_heard(desk, station)
    assert desk.of(job) == []
    station.provider.tell(None)
    await eventually(lambda: desk.is_done(job))
    await eventually(lambda: station.idle)
    assert station.credit == 1
