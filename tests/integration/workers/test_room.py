"""How many slots a route has may be for its model server to say, and to say anew; what else that tells is passed on."""

from __future__ import annotations

import asyncio

import pytest

from schemas.jobs import EngineStats
from tests.integration.workers.conftest import Hire
from tests.integration.workers.rig import Desk, Fake, waits_for
from tests.waiting import eventually

JOBS = 6


@pytest.mark.parametrize(("before", "room"), [(2, 4), (4, 2)], ids=["more", "fewer"])
async def test_a_route_has_as_many_slots_as_its_engine_has_room(hire: Hire, desk: Desk, before: int, room: int) -> None:
    """Told while the route is down, as an engine tells when it is ready: then no more run at once, and no fewer."""
    gate = asyncio.Event()
    station = await hire(slots=before, provider=Fake(waits_for(gate)))
    station.provider.tell("the engine is starting")
    station.provider.room = room
    station.provider.tell(None)
    jobs = await desk.publish_many(JOBS)
    await eventually(lambda: len(station.provider.running) == room, what="a full route")
    await eventually(lambda: desk.presence[-1].routes[0].free == 0, timeout_s=5)
    assert desk.presence[-1].routes[0].slots == room
    gate.set()
    await eventually(lambda: desk.all_done(jobs))
    assert station.provider.most == room


async def test_a_route_that_shrinks_while_it_is_full_takes_nothing_until_there_is_room(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station = await hire(slots=4, provider=Fake(waits_for(gate)))
    first = await desk.publish_many(4)
    await eventually(lambda: len(station.provider.running) == 4)
    station.provider.tell("the engine stopped")
    station.provider.room = 1
    station.provider.tell(None)
    await eventually(lambda: desk.presence[-1].routes[0].slots == 1)
    assert desk.presence[-1].routes[0].free == 0
    station.provider.most = 0
    rest = await desk.publish_many(JOBS)
    gate.set()
    await eventually(lambda: desk.all_done([*first, *rest]))
    assert station.provider.most == 1
    assert station.credit == 1


async def test_presence_carries_what_the_engine_says_of_itself(hire: Hire, desk: Desk) -> None:
    station = await hire()
    await eventually(lambda: bool(desk.presence[-1].routes), what="its route is open")
    assert desk.presence[-1].routes[0].engine is None
    stats = EngineStats(running=3, waiting=1, cache_used=0.25, prefix_asked=100, prefix_found=40)
    station.provider.said = stats
    await station.worker.announce()
    await eventually(lambda: desk.presence[-1].routes[0].engine == stats)
