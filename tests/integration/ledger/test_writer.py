"""The writer on a real NATS: in order, each once, and never past a gap."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bus.connection import Connection, connect
from bus.log import EventLog
from bus.publisher import Publisher
from bus.reader import StoredMessage, StreamGap
from bus.server import EmbeddedServer
from bus.streams import ensure_streams
from ledger.batch import Cursor, Placed
from ledger.store import FILE, Store, StoreOutOfMemory
from ledger.writer import Writer
from schemas import subjects
from schemas.errors import SetupError
from schemas.settings import LedgerSettings, NatsSettings
from tests.integration.ledger.conftest import RunningLedger, ledger_up, rows
from tests.stopwatch import Stopwatch
from tests.unit.ledger import samples
from tests.waiting import eventually


async def stored(ledger: RunningLedger, events: int) -> None:
    await eventually(
        lambda: ledger.writer.cursors[subjects.EVENTS].last_position >= events, what=f"{events} events stored"
    )


async def test_what_an_event_log_appends_can_be_asked_at_once(
    ledger: RunningLedger, connection: Connection, publisher: Publisher
) -> None:
    event_log = EventLog(connection, publisher, producer="ingress-1")
    for number in range(1, 101):
        for event in samples.whole(number):
            event_log.note(event)
    await event_log.append(samples.accepted(101))
    watch = Stopwatch()
    await stored(ledger, 401)
    assert watch.s < 1
    assert rows(
        ledger.store, "select count(*), count(distinct id), max(position) from events where log = 'EVENTS'"
    ) == [(401, 401, 401)]
    assert rows(ledger.store, "select status, count(*) from requests group by all order by 1") == [
        ("completed", 100),
        ("open", 1),
    ]


async def test_a_query_sees_what_was_durable_before_it(ledger: RunningLedger) -> None:
    """Without waiting for the writer's next commit of its own: that may be half a second off."""
    took_s = []
    watch = Stopwatch()
    for number in range(1, 20):
        seq = await ledger.publisher.publish("events.test", samples.page(samples.accepted(number)), timeout_s=5)
        began = time.monotonic()
        assert await ledger.writer.catch_up(within_s=2.0)
        took_s.append(time.monotonic() - began)
        assert ledger.writer.cursors["EVENTS"].last_seq >= seq
        assert rows(ledger.store, "select count(*) from events where log = 'EVENTS'") == [(number,)]
    assert statistics.median(took_s) - watch.waited_s / len(took_s) < 0.1


async def test_a_key_counts_as_soon_as_it_is_stated(ledger: RunningLedger) -> None:
    """Also behind another: what an operator states comes a little at a time, and is not gathered first."""
    watch = Stopwatch()
    for number in range(3):
        await ledger.state(samples.key_stated(f"{number:064x}"))
    assert watch.s < 0.4


async def test_a_ledger_goes_on_where_it_ended(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    for number in range(1, 6):
        async with ledger_up(nats_server, home, publisher) as ledger:
            await ledger.say(*samples.whole(number))
            assert rows(ledger.store, "select count(*), max(position) from events") == [(4 * number, 4 * number)]


async def test_it_begins_with_everything_that_was_said_before_it_was_there(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    for number in range(1, 1501):
        await publisher.publish("events.test", samples.page(samples.accepted(number)), timeout_s=5)
    async with ledger_up(nats_server, home, publisher) as ledger:
        await eventually(lambda: ledger.writer.caught_up, what="it has caught up")
        await stored(ledger, 1500)


async def test_stopping_stores_what_is_still_to_be_had(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    async with ledger_up(nats_server, home, publisher) as ledger:
        for number in range(1, 301):
            await publisher.publish("events.test", samples.page(samples.accepted(number)), timeout_s=5)
        ledger.writer.stop()
        await ledger.failed
        assert ledger.writer.cursors[subjects.EVENTS].last_position == 300


async def test_nats_may_restart_while_nothing_happens(nats_server: EmbeddedServer, ledger: RunningLedger) -> None:
    await ledger.say(*samples.whole(1))
    await nats_server.stop()
    await nats_server.start()

    async def said() -> bool:
        await ledger.publisher.publish("events.test", samples.page(*samples.whole(2)), timeout_s=1)
        return True

    await eventually(lambda: ledger.publisher._connection.is_up, what="the test's own connection is back")
    assert await said()
    await stored(ledger, 8)
    assert not ledger.failed.done()


async def _damaged(connection: Connection) -> None:
    """EVENTS made anew, so that its numbers begin at 1 again."""
    await connection.api(f"STREAM.DELETE.{subjects.EVENTS}")
    await ensure_streams(connection, NatsSettings())


async def test_a_stream_that_was_made_anew_is_refused_at_the_start(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    async with ledger_up(nats_server, home, publisher) as ledger:
        await ledger.say(*samples.whole())
    await _damaged(connection)
    await publisher.publish("events.test", samples.page(samples.accepted(2)), timeout_s=5)
    await publisher.publish("events.test", samples.page(samples.accepted(3)), timeout_s=5)
    with pytest.raises(SetupError, match="the stream EVENTS is not the one that this ledger has read to message 1"):
        async with ledger_up(nats_server, home, publisher):
            pass


async def test_a_wiped_server_is_refused_while_running(
    nats_server: EmbeddedServer, ledger: RunningLedger, tmp_path: Path
) -> None:
    """The stream comes back with the numbers that the reader waits for, but it is another stream."""
    import shutil

    await ledger.say(*samples.whole())
    await nats_server.stop()
    shutil.rmtree(tmp_path / "nats" / "jetstream")
    await nats_server.start()
    other = await connect(nats_server.url, name="other")
    await ensure_streams(other, NatsSettings())
    publisher = Publisher(other)
    await publisher.start()
    for number in range(2, 5):
        await publisher.publish("events.test", samples.page(samples.accepted(number)), timeout_s=5)
    with pytest.raises(SetupError, match="is not the one"):
        async with asyncio.timeout(10):
            await asyncio.shield(ledger.failed)
    await publisher.stop()
    await other.close()
    assert rows(ledger.store, "select count(*) from events where log = 'EVENTS'") == [(4,)]


async def test_a_gap_stops_the_ledger_instead_of_being_skipped(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    """EVENTS refuses deletion by anybody, so the test makes one that doesn't."""
    await connection.api(f"STREAM.DELETE.{subjects.EVENTS}")
    config = {"name": subjects.EVENTS, "subjects": [subjects.ALL_EVENTS], "storage": "file"}
    await connection.api(f"STREAM.CREATE.{subjects.EVENTS}", config)
    for number in range(1, 6):
        await publisher.publish("events.test", samples.page(samples.accepted(number)), timeout_s=5)
    await connection.api(f"STREAM.MSG.DELETE.{subjects.EVENTS}", {"seq": 3})
    store = Store.open(home / FILE, LedgerSettings())
    own = await connect(nats_server.url, name="ledger")
    writer = Writer(own, store, batch_pages=100)
    await writer.start()
    with pytest.raises(StreamGap, match="EVENTS has no message 3"):
        async with asyncio.timeout(10):
            await writer.run()
    assert rows(store, "select count(*) from events") == [(2,)]
    await own.close()
    store.close()


class ShortOfMemory(Store):
    """Has no memory left for a while."""

    refusals = 2

    def append(self, messages: Sequence[StoredMessage], cursor: Cursor) -> tuple[Cursor, list[Placed]]:
        if self.refusals:
            self.refusals -= 1
            raise StoreOutOfMemory
        return super().append(messages, cursor)


async def test_the_writer_has_the_first_right_to_the_memory(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    """Analysts' queries share the database's memory; they are given up, and the batch is stored all the same."""
    store = ShortOfMemory.open(home / FILE, LedgerSettings())
    own = await connect(nats_server.url, name="ledger")
    freed: list[int] = []
    writer = Writer(own, store, batch_pages=100, free_memory=lambda: freed.append(1))
    await writer.start()
    running = asyncio.create_task(writer.run())
    await publisher.publish("events.test", samples.page(*samples.whole()), timeout_s=5)
    await eventually(lambda: writer.cursors[subjects.EVENTS].last_position == 4)
    assert len(freed) == 2
    writer.stop()
    await running
    await own.close()
    store.close()
