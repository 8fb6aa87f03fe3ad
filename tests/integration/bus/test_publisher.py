"""Publishing to streams: each message's own answer, and an end to the waiting for it."""

from __future__ import annotations

import asyncio

import pytest

from bus.connection import ApiError, BusUnavailable, Connection, Message, MessageTooLarge
from bus.publisher import Publisher
from bus.server import EmbeddedServer
from tests.restarts import frozen, kill
from tests.stopwatch import Stopwatch
from tests.waiting import eventually


async def test_each_message_gets_its_own_number(publisher: Publisher) -> None:
    seqs = await asyncio.gather(*(publisher.publish(f"events.{n % 7}", b"x", timeout_s=5.0) for n in range(500)))
    assert sorted(seqs) == list(range(1, 501))
    assert not publisher._waiting


async def test_the_same_message_id_is_the_same_message(publisher: Publisher) -> None:
    headers = {"Nats-Msg-Id": "one"}
    first = await publisher.publish("events.test", b"x", timeout_s=5.0, headers=headers)
    assert await publisher.publish("events.test", b"x", timeout_s=5.0, headers=headers) == first


async def test_a_refusal_is_the_streams_own(publisher: Publisher) -> None:
    headers = {"Nats-Expected-Last-Subject-Sequence": "7"}
    with pytest.raises(ApiError) as told:
        await publisher.publish("control.org.x", b"x", timeout_s=5.0, headers=headers)
    assert told.value.error_code == 10071


async def test_a_message_over_the_servers_bound_is_refused_and_costs_nothing(
    connection: Connection, publisher: Publisher
) -> None:
    """The server counts the headers, too, and closes the connection of one who does not."""
    headers = {"Nats-Msg-Id": "x" * 20}
    over = b"x" * (connection.max_payload - 10)
    with pytest.raises(MessageTooLarge):
        await publisher.publish("jobs.m.r.interactive.o", over, timeout_s=5.0, headers=headers)
    largest = b"x" * (connection.max_payload - len("NATS/1.0\r\nNats-Msg-Id: \r\n\r\n") - 20)
    await publisher.publish("jobs.m.r.interactive.o", largest, timeout_s=5.0, headers=headers)
    assert connection.is_up
    assert connection.nc.stats["reconnects"] == 0


async def test_no_answer_in_time_is_an_error_in_time(nats_server: EmbeddedServer, publisher: Publisher) -> None:
    with frozen(nats_server.pid):
        watch = Stopwatch()
        with pytest.raises(BusUnavailable, match="in time"):
            await publisher.publish("events.test", b"x", timeout_s=0.2)
        assert watch.s < 1.0
    assert await publisher.publish("events.test", b"y", timeout_s=5.0) == 2  # the late answer was nobody's


async def test_whoever_waits_hears_of_a_lost_connection_at_once(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher
) -> None:
    with frozen(nats_server.pid):
        publishing = asyncio.create_task(publisher.publish("events.test", b"x", timeout_s=30.0))
        await eventually(lambda: publisher._waiting)
        watch = Stopwatch()
        await kill(nats_server)
    with pytest.raises(BusUnavailable):
        await publishing
    with pytest.raises(BusUnavailable):
        await publisher.publish("events.test", b"x", timeout_s=30.0)
    assert watch.s < 1.0


async def test_an_answer_that_is_not_jetstreams_is_an_error_of_that_message_alone(
    connection: Connection, publisher: Publisher
) -> None:
    answers = iter([b"{", b"[]", b"{}", b'"seq"'])

    async def nonsense(msg: Message) -> None:
        await connection.say(msg.reply, next(answers))

    await connection.listen("odd", nonsense)
    for _ in range(4):
        with pytest.raises(BusUnavailable, match="not JetStream's"):
            await publisher.publish("odd", b"x", timeout_s=5.0)
    assert await publisher.publish("events.test", b"x", timeout_s=5.0) == 1


async def test_stopping_ends_all_waiting(nats_server: EmbeddedServer, connection: Connection) -> None:
    publisher = Publisher(connection)
    await publisher.start()
    with frozen(nats_server.pid):
        publishing = asyncio.create_task(publisher.publish("events.test", b"x", timeout_s=30.0))
        await eventually(lambda: publisher._waiting)
        await publisher.stop()
        with pytest.raises(BusUnavailable):
            await publishing


async def test_a_cancelled_publish_leaves_nothing_behind(nats_server: EmbeddedServer, publisher: Publisher) -> None:
    with frozen(nats_server.pid):
        publishing = asyncio.create_task(publisher.publish("events.test", b"x", timeout_s=30.0))
        await eventually(lambda: publisher._waiting)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
        assert not publisher._waiting
