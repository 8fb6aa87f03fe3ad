"""Who is alive, folded from what workers say of themselves, and from their silence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from ingress.fleet import Fleet
from schemas import codec, subjects
from schemas.ids import WorkerId
from schemas.jobs import Announce, Presence, WorkerState
from tests.unit.ingress.doubles import MODEL, WORKER, Message, Wall, presence
from tests.waiting import eventually

OTHER = WorkerId("worker-b")
SOON_S = 0.05


class Ears:
    """A fleet, and what it hears."""

    def __init__(self) -> None:
        self.wall = Wall()
        self.fleet = Fleet(self.wall, lost_after_s=SOON_S)  # type: ignore[arg-type]  # as much of a connection as is used
        self.lost: list[WorkerId] = []
        self.fleet.on_lost(self.lost.append)

    async def hear(self, heard: Presence | bytes) -> None:
        data = heard if isinstance(heard, bytes) else codec.encode(heard)
        await self.wall.listeners[subjects.ALL_PRESENCE](Message("presence.x", data))


@pytest.fixture
async def ears() -> AsyncIterator[Ears]:
    made = Ears()
    await made.fleet.start()
    yield made
    await made.fleet.stop()


async def test_it_asks_everybody_who_they_are_when_it_starts_and_after_a_reconnect(ears: Ears) -> None:
    asked = (subjects.EVERY_WORKER, codec.encode(Announce()))
    assert ears.wall.said == [asked]
    for callback in ears.wall.reconnected:
        await callback()
    assert ears.wall.said == [asked, asked]


async def test_what_workers_offer_is_served_until_the_last_of_them_goes(ears: Ears) -> None:
    await ears.hear(presence(WORKER, routes=("r1", "r2")))
    await ears.hear(presence(OTHER, routes=("r2",)))
    assert set(ears.fleet.offers(MODEL)) == {"r1", "r2"}
    assert ears.fleet.models() == [MODEL]
    await ears.hear(presence(WORKER, state=WorkerState.GONE))
    assert set(ears.fleet.offers(MODEL)) == {"r2"}
    assert ears.lost == [WORKER]
    await ears.hear(presence(OTHER, state=WorkerState.GONE))
    assert ears.fleet.models() == []
    assert ears.fleet.knows(MODEL)


async def test_a_draining_worker_offers_nothing_but_is_not_lost(ears: Ears) -> None:
    await ears.hear(presence())
    await ears.hear(presence(state=WorkerState.DRAINING))
    assert not ears.fleet.offers(MODEL)
    assert ears.lost == []


async def test_another_process_under_its_name_is_its_end(ears: Ears) -> None:
    """It was killed and started again between two beats. Two that share a name speak in turns, and neither is dead."""
    await ears.hear(presence(started_ns=1))
    await ears.hear(presence(started_ns=2))
    assert ears.lost == [WORKER]
    assert ears.fleet.born_ns(WORKER) == 2
    await ears.hear(presence(started_ns=1))
    await ears.hear(presence(started_ns=2))
    assert ears.lost == [WORKER]


async def test_silence_is_loss(ears: Ears) -> None:
    await ears.hear(presence())
    await eventually(lambda: ears.lost == [WORKER])
    assert not ears.fleet.offers(MODEL)


async def test_silence_while_we_are_deaf_is_not(ears: Ears) -> None:
    await ears.hear(presence())
    ears.wall.is_up = False
    await asyncio.sleep(0.7)  # longer than the time between two looks, which is what is waited for
    assert ears.lost == []
    ears.wall.is_up = True
    for callback in ears.wall.reconnected:
        await callback()
    await asyncio.sleep(0)
    assert ears.lost == []
    await eventually(lambda: ears.lost == [WORKER])


async def test_silence_before_a_reconnect_is_told_of_is_not(ears: Ears) -> None:
    """The connection is up again some moments before it says so: that was when everybody was taken for lost."""
    await ears.hear(presence())
    ears.wall.is_up = False
    await asyncio.sleep(0.7)
    ears.wall.is_up = True
    await eventually(lambda: len(ears.wall.said) == 2, what="the next look asks who is there")
    assert ears.lost == []
    await eventually(lambda: ears.lost == [WORKER])


async def test_silence_while_this_process_stood_still_is_not(ears: Ears) -> None:
    """It wakes, and everybody's beats are still in its socket: nobody is lost before they are read."""
    await ears.hear(presence())
    time.sleep(3.0)  # noqa: ASYNC251 - stopped, as by SIGSTOP
    await asyncio.sleep(0.1)
    assert ears.lost == []
    await eventually(lambda: ears.lost == [WORKER])


async def test_what_is_no_presence_changes_nothing(ears: Ears) -> None:
    await ears.hear(presence())
    for junk in (b"", b"{}", b"\xff", b"[1]"):
        await ears.hear(junk)
    assert set(ears.fleet.offers(MODEL)) == {"r1"}
