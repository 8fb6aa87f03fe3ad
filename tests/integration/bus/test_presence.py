"""Who is there, by what ingresses say and by their silence, which is only worth something while we could hear."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator

import pytest

from bus.connection import Connection, connect
from bus.presence import LOOK_EVERY_S, STOOD_STILL_S, Beacon, Roll
from bus.server import EmbeddedServer
from schemas import subjects
from schemas.ids import IngressId
from schemas.jobs import PRESENCE_EVERY_S
from tests.restarts import cut, restart
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

INGRESS = IngressId("ingress-a")


@pytest.fixture
async def roll(connection: Connection) -> AsyncIterator[Roll]:
    made = Roll(connection)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def ingress(nats_server: EmbeddedServer) -> AsyncIterator[Connection]:
    made = await connect(nats_server.url, name=INGRESS)
    yield made
    await made.close()


async def test_one_that_beats_is_never_silent_for_long_and_one_that_leaves_is_for_ever(
    roll: Roll, ingress: Connection
) -> None:
    beacon = Beacon(ingress, INGRESS)
    assert not roll.has_heard(INGRESS)
    await beacon.start()
    await eventually(lambda: roll.has_heard(INGRESS))
    watch = Stopwatch()
    longest = 0.0
    while watch.wall_s < 2 * PRESENCE_EVERY_S + 0.5:
        longest = max(longest, roll.silent_s(INGRESS))
        await asyncio.sleep(0.05)
    assert longest > PRESENCE_EVERY_S / 2
    assert longest - watch.waited_s < PRESENCE_EVERY_S + 1.5
    assert await roll.is_listening(INGRESS)
    await beacon.stop()
    await eventually(lambda: roll.silent_s(INGRESS) == math.inf)
    await beacon.stop()


async def test_whoever_was_never_heard_is_silent_since_we_listen(roll: Roll) -> None:
    watch = Stopwatch()
    await asyncio.sleep(0.3)
    assert 0.2 < roll.silent_s(INGRESS) < watch.wall_s + 1.0
    now = _now()
    assert roll.silent_s(INGRESS, since=now) <= _now() - now
    assert not await roll.is_listening(INGRESS)


async def test_what_passed_while_our_connection_was_away_is_no_silence(
    roll: Roll, connection: Connection, nats_server: EmbeddedServer
) -> None:
    await asyncio.sleep(0.5)
    assert roll.silent_s(INGRESS) > 0.4
    cut_at = _now()
    await cut(connection)
    await eventually(lambda: 0.0 < roll.silent_s(INGRESS) < _now() - cut_at, every_s=0)
    await asyncio.sleep(0.5)
    killed_at = _now()
    await restart(nats_server, connection)
    await eventually(lambda: 0.0 < roll.silent_s(INGRESS) < _now() - killed_at, every_s=0)


async def test_what_passed_while_this_process_stood_still_is_no_silence(roll: Roll) -> None:
    """It wakes, and asks before it has read what waits in its socket."""
    await asyncio.sleep(0.3)
    time.sleep(LOOK_EVERY_S + STOOD_STILL_S + 0.5)  # noqa: ASYNC251 - stopped, as by SIGSTOP
    assert roll.silent_s(INGRESS) == 0.0
    woke_at = _now()
    await asyncio.sleep(0.1)
    assert roll.silent_s(INGRESS) <= _now() - woke_at


async def test_a_silent_process_has_a_listener_and_one_without_a_connection_has_none(
    roll: Roll, ingress: Connection
) -> None:
    beacon = Beacon(ingress, INGRESS)
    await beacon.start()
    assert beacon._beating is not None
    beacon._beating.cancel()
    await eventually(lambda: roll.is_listening(INGRESS))
    await cut(ingress)
    await eventually(lambda: roll.is_listening(INGRESS))
    await ingress.close()
    await eventually(lambda: is_unheard_of(roll))


def _now() -> float:
    return asyncio.get_running_loop().time()


async def is_unheard_of(roll: Roll) -> bool:
    return not await roll.is_listening(INGRESS)


async def test_a_lapse_is_noticed_by_the_one_who_lapsed(connection: Connection) -> None:
    lapses: list[float] = []

    async def on_lapse() -> None:
        lapses.append(time.monotonic())

    beacon = Beacon(connection, INGRESS, on_lapse=on_lapse)
    await beacon.start()
    await beacon._beat()
    assert lapses == []
    beacon._said_at -= PRESENCE_EVERY_S + STOOD_STILL_S + 0.1
    await beacon._beat()
    assert len(lapses) == 1
    await beacon._beat()
    assert len(lapses) == 1
    await beacon.stop()


async def test_what_is_no_presence_changes_nothing(roll: Roll, connection: Connection) -> None:
    for junk in (b"", b"{}", b"\xff", b"[1]"):
        await connection.say(subjects.ingress_presence(INGRESS), junk)
    await connection.nc.flush()
    await asyncio.sleep(0.05)
    assert not roll.has_heard(INGRESS)
