"""The event log: order, group commit, the bounds of a page, and what becomes of events while the server is away."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from bus.connection import Connection
from bus.log import EVENT_MAX_BYTES, PAGE_EVENTS_MAX, WAITING_EVENTS_MAX, EventLog
from bus.publisher import Publisher
from bus.reader import OrderedReader
from bus.server import EmbeddedServer
from bus.streams import PAGE_MAX_BYTES, stream_state
from schemas import codec
from schemas.errors import LogUnavailable
from schemas.events import RequestRejected
from tests.factories import make_event
from tests.restarts import frozen, kill, restart
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

decode_event = msgspec.json.Decoder(RequestRejected).decode


@pytest.fixture
async def log(connection: Connection, publisher: Publisher) -> EventLog:
    return EventLog(connection, publisher, producer="test")


async def test_an_event_is_stored_when_its_future_resolves(log: EventLog, connection: Connection) -> None:
    event = make_event()
    future = log.append(event)
    assert not future.done()
    await future
    assert await _stored(connection) == [event]


async def test_events_keep_the_order_in_which_they_were_taken(log: EventLog, connection: Connection) -> None:
    events = [make_event(http_status=number) for number in range(5000)]
    resolved: list[int] = []
    for number, event in enumerate(events):
        if number % 3:
            log.append(event).add_done_callback(lambda _, number=number: resolved.append(number))
        else:
            log.note(event)
        if number % 100 == 0:
            await asyncio.sleep(0)
    await log.flush()
    await asyncio.sleep(0)
    assert await _stored(connection) == events
    assert resolved == [number for number in range(5000) if number % 3]


async def test_many_events_at_once_cost_few_pages(log: EventLog, connection: Connection) -> None:
    """Those that come while a page is on its way go out together with the next one: one fsync for all of them."""

    async def client() -> None:
        for _ in range(10):
            await log.append(make_event())

    await asyncio.gather(*(client() for _ in range(200)))
    assert len(await _stored(connection)) == 2000
    pages = (await stream_state(connection, "EVENTS"))["messages"]
    assert pages <= 40  # ten rounds, and some that fell apart


async def test_what_may_wait_shares_the_page_of_what_comes_next(log: EventLog, connection: Connection) -> None:
    events = [make_event(http_status=number) for number in range(3)]
    for event in events[:2]:
        log.note(event, within_s=60.0)
    await asyncio.sleep(0.05)
    assert await _stored(connection) == []
    await log.append(events[2])
    assert await _stored(connection) == events
    assert (await stream_state(connection, "EVENTS"))["messages"] == 1


async def test_what_may_wait_waits_no_longer_and_not_for_a_process_that_ends(
    log: EventLog, connection: Connection
) -> None:
    events = [make_event(http_status=number) for number in range(2)]
    log.note(events[0], within_s=0.05)
    await eventually(lambda: log.waiting == 0)
    await log.flush()
    log.note(events[1], within_s=60.0)
    await log.flush()
    assert await _stored(connection) == events


async def test_one_event_alone_does_not_wait_for_others(log: EventLog) -> None:
    await log.append(make_event())
    watch = Stopwatch()
    for _ in range(20):
        await log.append(make_event())
    assert watch.s / 20 < 0.05  # 2 ms here; an fsync can take its time elsewhere


async def test_a_page_has_at_most_so_many_events(log: EventLog, connection: Connection) -> None:
    for _ in range(2 * PAGE_EVENTS_MAX + 1):
        log.note(make_event())
    await log.flush()
    assert await _page_sizes(connection) == [PAGE_EVENTS_MAX, PAGE_EVENTS_MAX, 1]


@pytest.mark.parametrize("event_bytes", [EVENT_MAX_BYTES, PAGE_MAX_BYTES // 2 - 10, PAGE_MAX_BYTES // 3 - 10, 5000])
async def test_a_page_is_never_larger_than_the_stream_takes(
    event_bytes: int, log: EventLog, connection: Connection
) -> None:
    """The stream counts the message's headers, too: full to the brim, a page would be refused."""
    events = [_event_of(event_bytes) for _ in range(2 * EVENT_MAX_BYTES // event_bytes + 2)]
    await asyncio.gather(*(log.append(event) for event in events))
    assert await _stored(connection) == events
    assert (await stream_state(connection, "EVENTS"))["messages"] >= 3


async def test_an_event_that_no_page_can_hold_is_refused_and_holds_nothing_up(log: EventLog) -> None:
    too_large = _event_of(EVENT_MAX_BYTES + 1)
    before = log.append(make_event())
    with pytest.raises(LogUnavailable, match="larger than a page"):
        log.append(too_large)
    with pytest.raises(LogUnavailable, match="larger than a page"):
        log.note(too_large)
    with pytest.raises(LogUnavailable, match="larger than a page"):
        await log.record(too_large, within_s=5.0)
    watch = Stopwatch()
    await before
    await log.append(make_event())
    assert watch.s < 1.0


async def test_what_waits_has_a_bound(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher
) -> None:
    log = EventLog(connection, publisher, producer="test")
    event = make_event()
    await kill(nats_server)
    await eventually(lambda: not connection.is_up)
    for _ in range(WAITING_EVENTS_MAX):
        log.note(event)
    with pytest.raises(LogUnavailable):
        log.note(event)
    with pytest.raises(LogUnavailable):
        log.append(event)
    await nats_server.start()
    async with asyncio.timeout(20.0):
        await log.flush()
    assert log.waiting == 0
    assert sum(await _page_sizes(connection)) == WAITING_EVENTS_MAX


async def test_nothing_is_lost_or_doubled_when_the_server_is_killed_again_and_again(
    nats_server: EmbeddedServer, log: EventLog, connection: Connection
) -> None:
    """Whatever moment the kill hits: before a page was sent, before it was stored, before its answer came."""
    taken: list[RequestRejected] = []
    durable: list[RequestRejected] = []

    async def write() -> None:
        while True:
            event = make_event()
            taken.append(event)
            log.append(event).add_done_callback(lambda _, event=event: durable.append(event))
            await asyncio.sleep(0.0005)

    writers = [asyncio.create_task(write()) for _ in range(4)]
    for _ in range(5):
        before = len(durable)
        await eventually(lambda before=before: len(durable) > before + 50, what="some durable events")
        await restart(nats_server)
    await restart(nats_server, connection)  # whose last breath could otherwise be taken while we look
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    await log.flush()
    stored = await _stored(connection)
    assert stored == taken
    assert len({event.id for event in stored}) == len(stored)


async def test_the_log_is_back_as_soon_as_its_server_is(nats_server: EmbeddedServer, log: EventLog) -> None:
    """Not when the answer that went to the old connection is overdue."""
    await log.append(make_event())
    with frozen(nats_server.pid):
        waiting = log.append(make_event())
        await eventually(lambda: log._publisher._waiting)
        await kill(nats_server)
    watch = Stopwatch()
    await nats_server.start()
    await waiting
    assert watch.s < 1.5


async def test_an_error_that_nobody_expects_loses_no_event(
    log: EventLog, connection: Connection, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its page is tried again like any other, and what waits behind it is not stuck."""
    publish, tries = publisher.publish, 0

    async def broken_once(*args: Any, **more: Any) -> int:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("the handler is closed")
        return await publish(*args, **more)

    monkeypatch.setattr(publisher, "publish", broken_once)
    events = [make_event(), make_event()]
    await asyncio.gather(*(log.record(event, within_s=5.0) for event in events))
    assert await _stored(connection) == events


async def test_a_record_that_takes_too_long_is_an_error_in_time_and_is_written_later(
    nats_server: EmbeddedServer, log: EventLog, connection: Connection
) -> None:
    event, later = make_event(), make_event()
    await kill(nats_server)
    watch = Stopwatch()
    with pytest.raises(LogUnavailable):
        await log.record(event, within_s=0.2)
    assert watch.s < 0.6
    await nats_server.start()
    await log.record(later, within_s=5.0)
    assert await _stored(connection) == [event, later]


async def test_a_page_that_was_stored_is_known_beyond_the_duplicate_window(
    log: EventLog, connection: Connection, publisher: Publisher
) -> None:
    other = EventLog(connection, publisher, producer="other")
    assert not await log._is_last(f"{log._session}.0")
    await log.append(make_event())
    await other.append(make_event())
    assert await log._is_last(f"{log._session}.0")
    assert not await log._is_last(f"{log._session}.1")
    assert not await other._is_last(f"{log._session}.0")
    await log.append(make_event())
    assert not await log._is_last(f"{log._session}.0")


async def test_producers_do_not_take_each_others_pages_for_their_own(
    connection: Connection, publisher: Publisher
) -> None:
    """Two of the same name, one started after the other: their message ids differ."""
    first, second = (EventLog(connection, publisher, producer="same") for _ in range(2))
    events = [make_event(), make_event()]
    await first.append(events[0])
    await second.append(events[1])
    assert await _stored(connection) == events


async def test_flushing_waits_for_everything_and_an_empty_log_is_flushed(log: EventLog, connection: Connection) -> None:
    await log.flush()
    for _ in range(3000):
        log.note(make_event())
    await log.flush()
    assert log.waiting == 0
    assert len(await _stored(connection)) == 3000


async def test_a_caller_that_stops_waiting_does_not_take_its_event_with_it(
    log: EventLog, connection: Connection
) -> None:
    event = make_event()
    log.append(event).cancel()
    await log.append(make_event())
    assert (await _stored(connection))[0] == event


def _event_of(size: int) -> RequestRejected:
    bare = len(codec.encode(make_event(model="")))
    return make_event(model="m" * (size - bare))


async def _pages(connection: Connection) -> list[list[RequestRejected]]:
    reader = OrderedReader(connection, stream="EVENTS")
    await reader.start()
    last = (await stream_state(connection, "EVENTS"))["last_seq"]
    pages: list[list[RequestRejected]] = []
    while len(pages) < last:
        messages = await reader.batch(max_messages=100, wait_s=5.0)
        assert messages, "the stream ends early"
        pages += [[decode_event(line) for line in message.data.split(b"\n")] for message in messages]
    await reader.close()
    return pages


async def _stored(connection: Connection) -> list[RequestRejected]:
    return [event for page in await _pages(connection) for event in page]


async def _page_sizes(connection: Connection) -> list[int]:
    return [len(page) for page in await _pages(connection)]
