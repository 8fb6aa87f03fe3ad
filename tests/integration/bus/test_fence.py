"""A fence in the log: what stands before it is all that its ingress ever writes, whatever that ingress believes."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from bus.connection import BusUnavailable, Connection
from bus.log import EventLog
from bus.publisher import Publisher
from bus.reader import OrderedReader
from bus.streams import stream_state
from schemas import subjects
from schemas.errors import LogUnavailable
from schemas.events import RequestRejected
from schemas.ids import IngressId
from tests.factories import make_event

INGRESS = IngressId("ingress-1")
FENCE = subjects.fence(INGRESS)

decode_event = msgspec.json.Decoder(RequestRejected).decode


def _log(connection: Connection, publisher: Publisher, producer: str = INGRESS) -> EventLog:
    return EventLog(connection, publisher, producer=producer, fence=subjects.fence(IngressId(producer)))


async def _build(publisher: Publisher, fence: str = FENCE) -> int:
    return await publisher.publish(fence, b"", timeout_s=5.0)


async def _stored(connection: Connection) -> list[tuple[int, RequestRejected]]:
    """Every event with the number of its message."""
    last = (await stream_state(connection, "EVENTS"))["last_seq"]
    reader = OrderedReader(connection, stream="EVENTS")
    await reader.start()
    found: list[tuple[int, RequestRejected]] = []
    seen = 0
    while seen < last:
        for message in await reader.batch(max_messages=100, wait_s=5.0):
            found += [(message.seq, decode_event(line)) for line in message.data.split(b"\n") if line]
            seen = message.seq
    await reader.close()
    return found


async def test_nothing_is_stored_behind_a_fence_and_everybody_who_waits_is_told(
    connection: Connection, publisher: Publisher
) -> None:
    noticed: list[bool] = []
    log = EventLog(connection, publisher, producer=INGRESS, fence=FENCE, on_fenced=lambda: noticed.append(True))
    other = _log(connection, publisher, "ingress-2")
    before, behind, elsewhere = make_event(), make_event(), make_event()
    await log.append(before)
    await _build(publisher)
    waiting = [log.append(behind), log.append(make_event())]
    for each in waiting:
        with pytest.raises(LogUnavailable):
            await each
    with pytest.raises(LogUnavailable):
        log.append(make_event())
    log.note(make_event())
    await other.append(elsewhere)
    assert [event for _, event in await _stored(connection)] == [before, elsewhere]
    assert log.fenced
    assert noticed == [True]
    assert not other.fenced


class Forgetful(Publisher):
    """Loses the acknowledgement of a page that was stored, and meanwhile somebody builds a fence."""

    lost = 0

    async def publish(
        self, subject: str, payload: bytes, *, timeout_s: float, headers: dict[str, str] | None = None
    ) -> int:
        seq = await super().publish(subject, payload, timeout_s=timeout_s, headers=headers)
        if not self.lost:
            self.lost = seq
            await super().publish(FENCE, b"", timeout_s=5.0)
            raise BusUnavailable("the answer is lost")
        return seq


async def test_a_page_that_stands_before_the_fence_is_known_to_be_stored(connection: Connection) -> None:
    """Its log asks again, and is refused like any other: only a look at the stream tells that the page is in it."""
    publisher = Forgetful(connection)
    await publisher.start()
    log, event = _log(connection, publisher), make_event()
    await log.record(event, within_s=5.0)
    assert publisher.lost
    assert [stored for _, stored in await _stored(connection)] == [event]
    with pytest.raises(LogUnavailable):
        await log.append(make_event())
    await publisher.stop()


async def test_who_was_out_of_reach_notices_a_fence_without_writing(
    connection: Connection, publisher: Publisher
) -> None:
    log, bare = _log(connection, publisher), EventLog(connection, publisher, producer="worker-1")
    await log.look_for_fence()
    assert not log.fenced
    await _build(publisher)
    await log.look_for_fence()
    assert log.fenced
    await bare.look_for_fence()
    await bare.append(make_event())


async def test_whoever_is_told_that_an_event_is_stored_was_before_the_fence(
    connection: Connection, publisher: Publisher
) -> None:
    """The fence comes at any moment of a busy log: each event is stored before it or refused, and its writer knows which."""
    dice = random.Random(3)
    durable: dict[str, int] = {}
    fences: dict[str, int] = {}

    async def write(log: EventLog) -> None:
        while not log.fenced:
            event = make_event(producer=log.producer)
            try:
                await log.append(event)
            except LogUnavailable:
                return
            durable[event.id] = 1

    for number in range(10):
        log = _log(connection, publisher, f"ingress-{number}")
        writers = [asyncio.create_task(write(log)) for _ in range(8)]
        await asyncio.sleep(dice.random() * 0.03)
        fences[log.producer] = await _build(publisher, subjects.fence(IngressId(log.producer)))
        await asyncio.gather(*writers)
    stored = await _stored(connection)
    assert {event.id for _, event in stored} == set(durable)
    assert len(stored) > 50
    assert all(seq < fences[event.producer] for seq, event in stored)
