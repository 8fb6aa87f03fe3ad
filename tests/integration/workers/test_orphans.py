"""Attempts whose ingress is gone are stopped soon; those of one that lives, or may come back, are not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from bus.connection import Connection, connect
from bus.presence import Beacon
from bus.server import EmbeddedServer
from schemas.events import INGRESS_LOST
from schemas.frames import Yielded
from schemas.ids import IngressId
from schemas.jobs import PRESENCE_EVERY_S, Job
from tests.integration.workers.conftest import Hire
from tests.integration.workers.rig import INGRESS, Desk, Fake, hangs
from tests.restarts import cut, restart
from tests.waiting import eventually
from workers.orphans import ABSENT_MAX, DOUBTED_AFTER_S, LOST_AFTER_S, Orphans, Served

STOPPED_WITHIN_S = DOUBTED_AFTER_S + (ABSENT_MAX + 1) + 4.0  # the looks, and a busy machine

Light = Callable[[], Awaitable[tuple[Connection, Beacon]]]


@pytest.fixture
async def light(nats_server: EmbeddedServer) -> AsyncIterator[Light]:
    """The rig's ingress with a connection and a beacon."""
    lit: list[tuple[Connection, Beacon]] = []

    async def make() -> tuple[Connection, Beacon]:
        own = await connect(nats_server.url, name=INGRESS)
        beacon = Beacon(own, INGRESS)
        await beacon.start()
        lit.append((own, beacon))
        return own, beacon

    yield make
    for own, beacon in lit:
        await beacon.stop()
        await own.close()


async def _running(desk: Desk, provider: Fake, **changes: object) -> Job:
    job = await desk.publish(**changes)
    await eventually(lambda: job.nonce in provider.running, what="the attempt")
    return job


async def test_what_runs_for_a_dead_ingress_is_stopped_and_has_its_receipt(
    hire: Hire, desk: Desk, light: Light
) -> None:
    own, beacon = await light()
    living = Beacon(desk.connection, IngressId("ingress-other"))
    await living.start()
    station = await hire(provider=Fake(hangs))
    job = await _running(desk, station.provider, announced=True)
    of_old = await _running(desk, station.provider, announced=False, ingress=IngressId("ingress-old"))
    other = await _running(desk, station.provider, announced=True, ingress=IngressId("ingress-other"))
    beacon._beating.cancel()  # type: ignore[union-attr]  # killed: it doesn't take its leave
    began = time.monotonic()
    await own.close()
    await eventually(lambda: job.nonce not in station.provider.running, timeout_s=STOPPED_WITHIN_S)
    assert station.provider.ended_at[job.nonce] - began > DOUBTED_AFTER_S - PRESENCE_EVERY_S
    receipt = await eventually(lambda: desk.receipt(job), what="the receipt")  # type: ignore[arg-type]
    assert receipt is not None
    assert (receipt.outcome, receipt.code, receipt.tokens_sent) == ("cancelled", INGRESS_LOST, 1)
    assert isinstance(desk.of(job)[-1], Yielded)
    assert {of_old.nonce, other.nonce} <= set(station.provider.running)
    await living.stop()


async def test_one_that_takes_its_leave_needs_no_waiting_for(hire: Hire, desk: Desk, light: Light) -> None:
    _, beacon = await light()
    station = await hire(provider=Fake(hangs))
    job = await _running(desk, station.provider, announced=True)
    await beacon.stop()
    await eventually(lambda: job.nonce not in station.provider.running, timeout_s=4.0)


async def test_a_connection_that_broke_and_came_back_costs_nothing(
    hire: Hire, desk: Desk, light: Light, nats_server: EmbeddedServer
) -> None:
    own, _ = await light()
    station = await hire(provider=Fake(hangs))
    job = await _running(desk, station.provider, announced=True)
    for _ in range(3):
        await cut(own)
        await asyncio.sleep(0.5)
    await restart(nats_server, own, station.connection)
    await asyncio.sleep(STOPPED_WITHIN_S - 2.0)
    assert job.nonce in station.provider.running


class Standstill(Orphans):
    """With no time between looks, and a clock that the test turns."""

    silent = 0.0

    def _silent_s(self, _: IngressId, __: float) -> float:
        return self.silent


async def test_one_that_stands_still_is_waited_for_as_long_as_the_ledger_would(
    connection: Connection, light: Light, desk: Desk
) -> None:
    """It is silent, but its connection is there: it may go on at any moment."""
    await light()
    stopped: list[IngressId] = []
    job = await desk.publish(announced=True)
    orphans = Standstill(connection, lambda: [Served(job, time.monotonic())], stopped.append)
    await orphans._roll.start()
    for orphans.silent in (0.0, DOUBTED_AFTER_S + 1, LOST_AFTER_S - 1):
        for _ in range(ABSENT_MAX + 1):
            await orphans._look()
    assert stopped == []
    orphans.silent = LOST_AFTER_S + 1
    await orphans._look()
    assert stopped == [INGRESS]
    await orphans.stop()


async def test_a_job_that_waited_longer_than_its_ingress_lived_is_not_begun(
    hire: Hire, desk: Desk, light: Light
) -> None:
    _, beacon = await light()
    station = await hire(provider=Fake(hangs))
    await eventually(lambda: station.worker._orphans._roll.has_heard(INGRESS), what="a beat")
    await beacon.stop()
    await eventually(lambda: station.worker._orphans._roll.silent_s(INGRESS) > LOST_AFTER_S)
    job = await desk.publish(announced=True)
    await asyncio.sleep(1.0)
    assert station.provider.taken == []
    await light()
    await eventually(lambda: job.nonce in station.provider.running, what="the job, for its ingress is back")
