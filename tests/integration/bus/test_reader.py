"""The ordered reader: contiguous over everything that can happen to a consumer, and never past a gap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bus.connection import Connection, Message, connect
from bus.publisher import Publisher
from bus.puller import EXPIRES_S, LOOK_EVERY_S, QUIET_S
from bus.reader import WINDOW, OrderedReader, StoredMessage, StreamGap
from bus.server import EmbeddedServer
from bus.streams import ensure_streams, stream_state
from schemas.settings import NatsSettings
from tests.restarts import cut, restart
from tests.waiting import eventually

SCRATCH = {"name": "SCRATCH", "subjects": ["scratch.>"], "storage": "memory"}


@pytest.fixture
async def scratch(connection: Connection) -> str:
    """A stream that may lose messages, unlike ours."""
    await connection.api("STREAM.CREATE.SCRATCH", SCRATCH)
    return "SCRATCH"


async def test_it_reads_everything_in_order(connection: Connection, publisher: Publisher, scratch: str) -> None:
    await _fill(publisher, 300)
    async with _reading(connection, scratch) as reader:
        messages = await _read(reader, 300)
    assert [message.seq for message in messages] == list(range(1, 301))
    assert messages[41] == StoredMessage("scratch.a", 42, b"41")


async def test_it_begins_behind_its_position(connection: Connection, publisher: Publisher, scratch: str) -> None:
    await _fill(publisher, 100)
    async with _reading(connection, scratch, after=60) as reader:
        assert not reader.caught_up
        assert [message.seq for message in await _read(reader, 40)] == list(range(61, 101))
        assert reader.caught_up
        assert await reader.pending() == 0
    async with _reading(connection, scratch, after=100) as reader:
        assert reader.caught_up
        assert await reader.batch(max_messages=10, wait_s=0.05) == []
        await publisher.publish("scratch.a", b"new", timeout_s=5.0)
        assert [message.data for message in await _read(reader, 1)] == [b"new"]


async def test_an_empty_stream_is_read_as_soon_as_something_comes(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    async with _reading(connection, scratch) as reader:
        assert reader.caught_up
        waiting = asyncio.create_task(reader.batch(max_messages=10, wait_s=5.0))
        await publisher.publish("scratch.a", b"first", timeout_s=5.0)
        assert [message.data for message in await waiting] == [b"first"]


async def test_a_large_backlog_comes_through_a_small_window(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    await _fill(publisher, 20_000)
    async with _reading(connection, scratch) as reader:
        most = 0
        messages: list[StoredMessage] = []
        while len(messages) < 20_000:
            most = max(most, len(reader._waiting))
            messages += await reader.batch(max_messages=100, wait_s=5.0)
    assert [message.seq for message in messages] == list(range(1, 20_001))
    assert most <= WINDOW


async def test_nothing_is_fetched_beyond_the_window_until_it_is_taken(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    await _fill(publisher, 3 * WINDOW)
    async with _reading(connection, scratch) as reader:
        await eventually(lambda: len(reader._waiting) == WINDOW)
        assert (await _info(connection, reader))["delivered"]["consumer_seq"] == WINDOW
        assert not reader.caught_up
        assert await reader.pending() == 3 * WINDOW
        assert len(await reader.batch(max_messages=WINDOW + 100, wait_s=5.0)) == WINDOW
        await eventually(lambda: len(reader._waiting) == WINDOW)
        assert await reader.pending() == 2 * WINDOW


async def test_it_goes_on_over_servers_that_are_killed(nats_server: EmbeddedServer, connection: Connection) -> None:
    writer = await connect(nats_server.url, name="writer")
    publisher = Publisher(writer)
    await publisher.start()
    stored = 0

    async def write() -> None:
        nonlocal stored
        while True:
            try:
                stored = await publisher.publish("events.test", b"x", timeout_s=1.0)
            except Exception:  # noqa: BLE001 - whatever a dying server does to a publisher is not what is tested
                await asyncio.sleep(0.01)

    writing = asyncio.create_task(write())
    async with _reading(connection, "EVENTS") as reader:
        messages: list[StoredMessage] = []
        for _ in range(3):
            messages += await _read(reader, 50)
            await restart(nats_server)
        messages += await _read(reader, 50)
        writing.cancel()
        last = (await stream_state(connection, "EVENTS"))["last_seq"]
        messages += await _read(reader, last - len(messages))
    assert [message.seq for message in messages] == list(range(1, last + 1))
    assert last >= stored
    await publisher.stop()
    await writer.close()


async def test_it_goes_on_when_its_consumer_is_deleted(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    await _fill(publisher, 2000)
    async with _reading(connection, scratch) as reader:
        messages = await _read(reader, 100)
        for _ in range(3):
            await connection.api(f"CONSUMER.DELETE.{scratch}.{reader._consumer}")
            messages += await _read(reader, 600)
        messages += await _read(reader, 100)
    assert [message.seq for message in messages] == list(range(1, 2001))


async def test_it_goes_on_over_lost_connections(
    nats_server: EmbeddedServer, publisher: Publisher, scratch: str
) -> None:
    """The old consumer lives on: what it sent into the dead connection is missing, and what it sends now is not for us."""
    await _fill(publisher, 5000)
    connection = await connect(nats_server.url, name="reader")
    async with _reading(connection, scratch) as reader:
        messages: list[StoredMessage] = []
        most = 0
        for _ in range(4):
            messages += await _read(reader, 500)
            most = max(most, len(reader._waiting))
            connection.nc._transport._io_writer.transport.abort()
        messages += await _read(reader, 3000)
        assert reader.caught_up
    assert [message.seq for message in messages] == list(range(1, 5001))
    assert most <= WINDOW
    await connection.close()


async def test_the_window_keeps_its_size_over_lost_connections(
    nats_server: EmbeddedServer, publisher: Publisher, scratch: str
) -> None:
    connection = await connect(nats_server.url, name="reader")
    await _fill(publisher, 4 * WINDOW)
    async with _reading(connection, scratch) as reader:
        for _ in range(3):
            await _read(reader, 10)
            await cut(connection)
        await eventually(lambda: len(reader._waiting) >= WINDOW)
        await eventually(lambda: reader._puller._credit == 0 and len(reader._waiting) == WINDOW)
    await connection.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulls are taken for lost sooner, so that a test needn't wait for it."""
    monkeypatch.setattr("bus.puller.LAPSE_GRACE_S", 0.2 - EXPIRES_S)


@pytest.mark.usefixtures("impatient")
async def test_messages_that_were_lost_on_the_way_are_fetched_again(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    """The consumer counts them as delivered, and no connection was lost."""
    await _fill(publisher, 10)
    async with _reading(connection, scratch) as reader:
        messages = await _read(reader, 10)
        await _fill(publisher, 10)
        go_on = _drops_what_was_there(connection, reader)
        messages += await _read(reader, 1)
        await eventually(lambda: _delivered(connection, reader, 20))
        go_on()
        await _fill(publisher, 5)
        messages += await _read(reader, 14)
        assert reader._puller.credit == 0  # what came from the consumer that was left cost nothing
    assert [message.seq for message in messages] == list(range(1, 26))


@pytest.mark.usefixtures("impatient")
async def test_a_fold_notices_messages_that_were_lost_on_the_way(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    """Holes are normal for a fold, so the numbers of the stream alone would not tell."""
    await _fill(publisher, 5)
    async with _reading(connection, scratch, last_per_subject=True) as reader:
        assert [message.seq for message in await _read(reader, 1)] == [5]
        for name in ("b", "lost"):
            await publisher.publish(f"scratch.{name}", b"x", timeout_s=5.0)
        go_on = _drops_what_was_there(connection, reader)
        assert [message.subject for message in await _read(reader, 1)] == ["scratch.b"]
        await eventually(lambda: _delivered(connection, reader, 3))
        go_on()
        await publisher.publish("scratch.c", b"x", timeout_s=5.0)
        assert [message.subject for message in await _read(reader, 2)] == ["scratch.lost", "scratch.c"]


@pytest.mark.parametrize("missing", [1, 2, 50, 100])
async def test_a_gap_is_refused_after_everything_before_it(
    missing: int, connection: Connection, publisher: Publisher, scratch: str
) -> None:
    await _fill(publisher, 101)
    await connection.api(f"STREAM.MSG.DELETE.{scratch}", {"seq": missing})
    async with _reading(connection, scratch) as reader:
        if missing > 1:
            assert [message.seq for message in await _read(reader, missing - 1)] == list(range(1, missing))
        for _ in range(2):
            with pytest.raises(StreamGap, match=f"no message {missing}: the next one is {missing + 1}") as told:
                await reader.batch(max_messages=10, wait_s=5.0)
        assert (told.value.expected, told.value.got) == (missing, missing + 1)


async def test_a_stream_whose_beginning_is_gone_is_a_gap(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    await _fill(publisher, 10)
    await connection.api(f"STREAM.PURGE.{scratch}", {"seq": 8})
    async with _reading(connection, scratch) as reader:
        with pytest.raises(StreamGap, match="no message 1: the next one is 8"):
            await reader.batch(max_messages=10, wait_s=5.0)
    async with _reading(connection, scratch, after=7) as reader:
        assert len(await _read(reader, 3)) == 3


async def test_a_stream_that_ends_before_what_was_seen_is_a_gap(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    """Another stream of the same name. The server would wait for it to grow, and its first hundred messages were never read."""
    await _fill(publisher, 10)
    async with _reading(connection, scratch, after=100) as reader:
        with pytest.raises(StreamGap, match="no message 101: the next one is 11"):
            await reader.batch(max_messages=10, wait_s=5.0)


async def test_a_stream_that_is_replaced_while_it_is_read_is_a_gap(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    await _fill(publisher, 10)
    async with _reading(connection, scratch) as reader:
        await _read(reader, 10)
        await connection.api(f"STREAM.DELETE.{scratch}")
        await connection.api(f"STREAM.CREATE.{scratch}", SCRATCH)
        with pytest.raises(StreamGap, match="no message 11: the next one is 1"):
            await reader.batch(max_messages=10, wait_s=10.0)


async def test_a_fold_begins_with_the_last_message_on_each_subject_and_goes_on_with_all(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    for subject, body in [("a", b"1"), ("b", b"2"), ("a", b"3"), ("c", b"4"), ("b", b"5")]:
        await publisher.publish(f"scratch.{subject}", body, timeout_s=5.0)
    async with _reading(connection, scratch, last_per_subject=True) as reader:
        assert not reader.caught_up
        assert [(m.subject, m.data) for m in await _read(reader, 3)] == [
            ("scratch.a", b"3"),
            ("scratch.c", b"4"),
            ("scratch.b", b"5"),
        ]
        assert reader.caught_up
        for body in (b"6", b"7"):
            await publisher.publish("scratch.a", body, timeout_s=5.0)
        assert [message.data for message in await _read(reader, 2)] == [b"6", b"7"]


async def test_a_fold_misses_nothing_over_a_restart(nats_server: EmbeddedServer, connection: Connection) -> None:
    writer = await connect(nats_server.url, name="writer")
    publisher = Publisher(writer)
    await publisher.start()
    async with _reading(connection, "CONTROL", last_per_subject=True) as reader:
        await publisher.publish("control.org.a", b"1", timeout_s=5.0)
        assert len(await _read(reader, 1)) == 1
        await restart(nats_server, writer)
        await publisher.publish("control.org.a", b"2", timeout_s=5.0)
        await publisher.publish("control.org.a", b"3", timeout_s=5.0)
        assert [message.data for message in await _read(reader, 2)] == [b"2", b"3"]
    await publisher.stop()
    await writer.close()


async def test_closing_leaves_no_pull_behind(connection: Connection, scratch: str) -> None:
    async with _reading(connection, scratch) as reader:
        assert await reader.batch(max_messages=1, wait_s=0.05) == []
        await eventually(lambda: _waits(connection, reader))
    assert not await _waits(connection, reader)


async def test_nobody_is_woken_for_what_comes_while_nobody_waits(
    connection: Connection, publisher: Publisher, scratch: str
) -> None:
    """All of it comes at once when somebody does."""
    async with _reading(connection, scratch) as reader:
        assert await reader.batch(max_messages=1, wait_s=0.05) == []
        await _fill(publisher, 1)
        await eventually(lambda: _delivered(connection, reader, 1))
        await _fill(publisher, 49)
        assert len(await reader.batch(max_messages=100, wait_s=5.0)) == 1
        await asyncio.sleep(QUIET_S + LOOK_EVERY_S + 0.1)  # by when a puller asks for all that it may
        assert await _delivered(connection, reader, 1)
        assert len(await reader.batch(max_messages=100, wait_s=5.0)) == 49
        assert reader.caught_up


@asynccontextmanager
async def _reading(connection: Connection, stream: str, **begin: Any) -> AsyncIterator[OrderedReader]:
    reader = OrderedReader(connection, stream=stream, **begin)
    await ensure_streams(connection, NatsSettings())
    await reader.start()
    yield reader
    await reader.close()


async def _read(reader: OrderedReader, messages: int) -> list[StoredMessage]:
    read: list[StoredMessage] = []
    while len(read) < messages:
        batch = await reader.batch(max_messages=min(100, messages - len(read)), wait_s=5.0)
        assert batch, f"{len(read)} of {messages} came"
        read += batch
    return read


async def _fill(publisher: Publisher, messages: int) -> None:
    for begin in range(0, messages, 500):
        numbers = range(begin, min(messages, begin + 500))
        await asyncio.gather(*(publisher.publish("scratch.a", b"%d" % n, timeout_s=5.0) for n in numbers))


def _drops_what_was_there(connection: Connection, reader: OrderedReader) -> Callable[[], None]:
    """The first of what waits in the stream comes; the others are lost, until what this returns is called."""
    heard, sid = connection.nc.at_once, reader._puller._subscriptions[-1]._id
    on_message = heard[sid]

    def the_first_of_all(message: Message) -> None:
        heard[sid] = lambda _: None
        on_message(message)

    heard[sid] = the_first_of_all
    return lambda: heard.update({sid: on_message})


async def _info(connection: Connection, reader: OrderedReader) -> dict[str, Any]:
    return await connection.api(f"CONSUMER.INFO.{reader._stream}.{reader._consumer}")


async def _delivered(connection: Connection, reader: OrderedReader, messages: int) -> bool:
    return bool((await _info(connection, reader))["delivered"]["consumer_seq"] == messages)


async def _waits(connection: Connection, reader: OrderedReader) -> bool:
    return bool((await _info(connection, reader))["num_waiting"])
