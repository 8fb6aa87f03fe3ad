"""The puller: what is outstanding, over everything that can happen to a pull."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from bus.connection import Connection, Message, connect
from bus.publisher import Publisher
from bus.puller import RETRY_WAIT_S, Puller
from bus.server import EmbeddedServer
from bus.streams import ACK_WAIT_S, SECOND_NS, ensure_consumer, ensure_streams, job_consumer
from schemas.jobs import Lane
from schemas.settings import NatsSettings
from tests.restarts import cut, kill
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

SUBJECT = "jobs.m.r.interactive.o"
CONSUMER = "route==r==interactive"


class Taker:
    """Pulls and keeps what comes."""

    def __init__(self, connection: Connection, *, expires_s: float = 10.0, **config: Any) -> None:
        self.messages: list[Message] = []
        self.at: dict[bytes, float] = {}
        self._connection = connection
        self._config = {**job_consumer(route="r", lane=Lane.INTERACTIVE), **config}
        self.puller = Puller(connection, stream="JOBS", ensure=self._ensure, on_message=self._take, expires_s=expires_s)

    async def start(self, credit: int) -> None:
        await self.puller.start()
        self.puller.grant(credit)
        await eventually(lambda: waiting(self._connection), what="the pull")

    @property
    def granted(self) -> int:
        """Messages that it may still get."""
        return self.puller._credit

    def bodies(self) -> list[bytes]:
        return [message.data for message in self.messages]

    async def ack_all(self) -> None:
        for message in self.messages:
            await self._connection.say(message.reply, b"+ACK")

    async def _ensure(self) -> str:
        await ensure_streams(self._connection, NatsSettings())
        return str((await ensure_consumer(self._connection, "JOBS", self._config))["name"])

    def _take(self, message: Message) -> None:
        self.messages.append(message)
        self.at[message.data] = time.monotonic()


async def test_it_never_asks_for_more_than_it_was_granted(connection: Connection, publisher: Publisher) -> None:
    taker = Taker(connection)
    await taker.start(3)
    await _publish(publisher, 10)
    await eventually(lambda: len(taker.messages) == 3)
    taker.puller.grant(2)
    await eventually(lambda: len(taker.messages) == 5)
    await _nothing_more(connection, taker, 5)
    assert taker.granted == 0
    await taker.puller.stop()


async def test_a_lost_connection_does_not_double_what_is_outstanding(
    nats_server: EmbeddedServer, publisher: Publisher
) -> None:
    """The server serves an old pull again as soon as its inbox is back, beside the one that was asked anew."""
    connection = await connect(nats_server.url, name="puller")
    taker = Taker(connection)
    await taker.start(4)
    for _ in range(3):
        await cut(connection)
        await eventually(lambda: len(taker.puller._subscriptions) == 1 and taker.puller._asked == 4)
    await eventually(lambda: waiting(connection))
    await _publish(publisher, 20)
    await eventually(lambda: len(taker.messages) == 4)
    await _nothing_more(connection, taker, 4)
    await taker.puller.stop()
    await connection.close()


async def test_a_pull_that_expires_is_asked_again_and_counts_once(connection: Connection, publisher: Publisher) -> None:
    taker = Taker(connection, expires_s=0.1)
    await taker.start(3)
    await eventually(lambda: _asked(taker) >= 5, what="a few expired pulls")
    await _publish(publisher, 10)
    await eventually(lambda: len(taker.messages) == 3)
    await _nothing_more(connection, taker, 3)
    await taker.puller.stop()


async def test_a_pull_that_ended_without_a_word_is_asked_again_however_busy_it_is(
    connection: Connection, publisher: Publisher
) -> None:
    taker = Taker(connection, expires_s=0.1)
    await taker.puller.start()
    taker.puller._asked = 1  # as if it had been asked, and lost

    async def disturb() -> None:
        while True:
            taker.puller.grant(0)
            await asyncio.sleep(0.01)

    disturbing = asyncio.create_task(disturb())
    taker.puller.grant(1)
    await _publish(publisher, 1)
    await eventually(lambda: len(taker.messages) == 1)
    disturbing.cancel()
    await taker.puller.stop()


async def test_a_consumer_that_is_deleted_is_made_again(connection: Connection, publisher: Publisher) -> None:
    taker = Taker(connection)
    await taker.start(4)
    for round_ in range(3):
        await connection.api(f"CONSUMER.DELETE.JOBS.{CONSUMER}")
        await _publish(publisher, 1)
        watch = Stopwatch()
        await eventually(lambda round_=round_: len(taker.messages) == round_ + 1)
        assert watch.s < 1.0
        await connection.request(taker.messages[-1].reply, b"+ACK", timeout_s=5.0)  # answered when it is done
    assert taker.granted == 1
    await taker.puller.stop()


async def test_a_job_published_while_the_server_restarts_comes_soon_after(nats_server: EmbeddedServer) -> None:
    """Queue, consumer and pull were in the server's memory: all three are made again."""
    connection, client = await connect(nats_server.url, name="puller"), await connect(nats_server.url, name="client")
    taker = Taker(connection)
    await taker.start(4)
    publisher = Publisher(client)
    await publisher.start()
    for body in (b"1", b"2", b"3"):
        reconnects = client.nc.stats["reconnects"]
        await kill(nats_server)
        await nats_server.start()
        watch, began = Stopwatch(), time.monotonic()
        await eventually(lambda r=reconnects: client.is_up and client.nc.stats["reconnects"] > r)
        await ensure_streams(client, NatsSettings())
        await publisher.publish(SUBJECT, body, timeout_s=5.0)
        await eventually(lambda body=body: body in taker.at)
        assert taker.at[body] - began - watch.waited_s < 1.0  # 0.2 s here: the wait before a reconnect
        await eventually(lambda: len(taker.puller._subscriptions) == 1)
    assert taker.bodies() == [b"1", b"2", b"3"]
    assert taker.granted == 1
    await taker.puller.stop()
    await publisher.stop()
    await client.close()
    await connection.close()


async def test_stopping_leaves_no_pull_behind(connection: Connection, publisher: Publisher) -> None:
    first, second = Taker(connection), Taker(connection)
    await first.start(8)
    await first.puller.stop()
    assert not await waiting(connection)
    await _publish(publisher, 1)
    info = await eventually(lambda: _when(connection, num_pending=1), what="the consumer's notice of it")
    assert info["num_ack_pending"] == 0
    await second.puller.start()
    second.puller.grant(1)
    watch = Stopwatch()
    await eventually(lambda: len(second.messages) == 1)
    assert watch.s < 1.0
    await second.puller.stop()


async def test_whatever_the_server_had_sent_when_it_stops_is_handed_on(
    connection: Connection, publisher: Publisher
) -> None:
    """A message in nobody's hands would wait for the whole of ack_wait. One that was still on its way within the server when the
    pull was given up is not: the server notices that nobody took it, counts the delivery, and makes it again at once.
    """
    for _ in range(5):
        taker, next_one = Taker(connection), Taker(connection)
        await taker.start(200)
        publishing = asyncio.create_task(_publish(publisher, 100))
        await eventually(lambda taker=taker: taker.messages, every_s=0)
        watch = Stopwatch()
        await taker.puller.stop()
        await publishing
        await next_one.puller.start()
        next_one.puller.grant(200)
        await eventually(lambda t=taker, n=next_one: len(t.messages) + len(n.messages) >= 100)
        assert watch.s < ACK_WAIT_S / 2
        await next_one.puller.stop()
        assert sorted(taker.bodies() + next_one.bodies()) == sorted(b"%d" % number for number in range(100))
        for each in (taker, next_one):
            await each.ack_all()
        await eventually(lambda: _when(connection, num_ack_pending=0), what="the acks")


async def test_what_is_not_acked_comes_again_after_ack_wait(connection: Connection, publisher: Publisher) -> None:
    taker = Taker(connection, ack_wait=int(0.4 * SECOND_NS))
    await taker.start(3)
    await _publish(publisher, 1)
    await eventually(lambda: len(taker.messages) == 2, timeout_s=2.0)
    first, again = taker.messages
    assert first.data == again.data
    assert again.metadata.num_delivered == 2
    await taker.ack_all()
    await taker.puller.stop()


async def test_a_thousand_jobs_with_a_credit_of_eight_come_once_each(
    connection: Connection, publisher: Publisher
) -> None:
    taken: list[bytes] = []
    running = most = 0
    tasks: set[asyncio.Task[None]] = set()

    async def work(message: Message) -> None:
        nonlocal running
        await asyncio.sleep(0.001)
        taken.append(message.data)
        await connection.say(message.reply, b"+ACK")
        running -= 1
        puller.grant(1)

    def take(message: Message) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        task = asyncio.create_task(work(message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def ensure() -> str:
        return str((await ensure_consumer(connection, "JOBS", job_consumer(route="r", lane=Lane.INTERACTIVE)))["name"])

    puller = Puller(connection, stream="JOBS", ensure=ensure, on_message=take)
    await puller.start()
    puller.grant(8)
    await _publish(publisher, 1000)
    await eventually(lambda: len(taken) == 1000, timeout_s=10.0)
    assert sorted(taken) == sorted(b"%d" % number for number in range(1000))
    assert most == 8
    assert puller._credit == 8
    await puller.stop()


async def test_a_pull_that_is_refused_is_not_asked_again_in_a_hurry(
    connection: Connection, publisher: Publisher
) -> None:
    first, second = Taker(connection, max_waiting=1), Taker(connection, max_waiting=1)
    await first.start(1)
    await second.puller.start()
    second.puller.grant(1)
    await eventually(lambda: _asked(second) >= 2)
    began, asked = time.monotonic(), _asked(second)
    await eventually(lambda: _asked(second) >= asked + 4)
    assert time.monotonic() - began >= 3 * RETRY_WAIT_S
    await first.puller.stop()
    await _publish(publisher, 1)
    await eventually(lambda: len(second.messages) == 1, what="its turn")
    await second.puller.stop()


async def test_what_cannot_be_had_yet_is_waited_for(connection: Connection, publisher: Publisher) -> None:
    """JOBS is gone and nobody makes it again for a while."""
    tries = 0
    taken: list[bytes] = []

    def take(message: Message) -> None:
        taken.append(message.data)

    async def ensure() -> str:
        nonlocal tries
        tries += 1
        if tries > 3:
            await ensure_streams(connection, NatsSettings())
        return str((await ensure_consumer(connection, "JOBS", job_consumer(route="r", lane=Lane.INTERACTIVE)))["name"])

    puller = Puller(connection, stream="JOBS", ensure=ensure, on_message=take)
    await puller.start()
    puller.grant(1)
    await eventually(lambda: waiting(connection))
    await connection.api("STREAM.DELETE.JOBS")
    await eventually(lambda: tries > 3, what="a few refusals")
    await eventually(lambda: puller._asked == 1, what="the pull on the new queue")
    await _publish(publisher, 1)
    await eventually(lambda: taken == [b"0"])
    await puller.stop()


async def test_a_receiver_that_breaks_costs_one_message(connection: Connection, publisher: Publisher) -> None:
    taken: list[bytes] = []

    def take(message: Message) -> None:
        taken.append(message.data)
        raise RuntimeError

    async def ensure() -> str:
        return str((await ensure_consumer(connection, "JOBS", job_consumer(route="r", lane=Lane.INTERACTIVE)))["name"])

    puller = Puller(connection, stream="JOBS", ensure=ensure, on_message=take)
    await puller.start()
    puller.grant(3)
    await _publish(publisher, 3)
    await eventually(lambda: taken == [b"0", b"1", b"2"])
    await puller.stop()


@pytest.mark.parametrize("moment", ["at once", "while moving"])
async def test_it_stops_whatever_it_is_doing(moment: str, nats_server: EmbeddedServer, connection: Connection) -> None:
    taker = Taker(connection)
    await taker.start(4)
    if moment == "while moving":
        await cut(connection)
        await eventually(lambda: len(taker.puller._subscriptions) == 2, every_s=0)
    watch = Stopwatch()
    await taker.puller.stop()
    assert watch.s < 2.5
    assert not await waiting(connection)
    assert not connection._reconnected


async def waiting(connection: Connection) -> bool:
    return bool((await _info(connection))["num_waiting"])


async def _info(connection: Connection) -> dict[str, Any]:
    return await connection.api(f"CONSUMER.INFO.JOBS.{CONSUMER}")


async def _when(connection: Connection, **numbers: int) -> dict[str, Any] | None:
    """What the server says of the consumer, once it has these *numbers*."""
    info = await _info(connection)
    return info if numbers.items() <= info.items() else None


def _asked(taker: Taker) -> int:
    return int(repr(taker.puller._numbers).removeprefix("count(").removesuffix(")"))


async def _publish(publisher: Publisher, jobs: int) -> None:
    await asyncio.gather(*(publisher.publish(SUBJECT, b"%d" % n, timeout_s=5.0) for n in range(jobs)))


async def _nothing_more(connection: Connection, taker: Taker, expected: int) -> None:
    """The server itself says how many it has handed out and how many it still would."""
    info = await _info(connection)
    assert info["delivered"]["consumer_seq"] == expected
    assert info["num_waiting"] == 0
    assert len(taker.messages) == expected
