"""The job queue as the ingress sees it."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from bus.connection import Connection, Message
from bus.publisher import Publisher
from bus.puller import Puller
from bus.queue import JobQueue
from bus.server import EmbeddedServer
from bus.streams import ensure_consumer, ensure_streams, job_consumer, stream_state
from schemas import codec
from schemas.errors import BadRequest, QueueUnavailable
from schemas.ids import OrgId, RouteId, new_id
from schemas.jobs import Job, Lane
from schemas.settings import NatsSettings
from tests.factories import new_job
from tests.restarts import kill, restart
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

HEADERS_BYTES = len(f"NATS/1.0\r\nNats-Msg-Id: {new_id()}.1\r\nNats-TTL: 60\r\n\r\n")


@pytest.fixture
async def queue(connection: Connection, publisher: Publisher) -> JobQueue:
    return JobQueue(connection, publisher)


async def test_a_job_arrives_as_it_was_published(queue: JobQueue, connection: Connection) -> None:
    job = new_job({"messages": [{"role": "user", "content": "ünïcode 🐜"}]}, model="meta-llama/Llama-3.1-8B")
    await queue.publish(job)
    assert await _take(connection, 1) == [job]


async def test_jobs_of_one_lane_arrive_in_order(queue: JobQueue, connection: Connection) -> None:
    jobs = [new_job(org=OrgId(f"org {number % 3}")) for number in range(50)]
    for job in jobs:
        await queue.publish(job)
    await queue.publish(new_job(), lane=Lane.BATCH)
    await queue.publish(new_job(route=RouteId("other")))
    assert await _take(connection, 50) == jobs


async def test_the_same_attempt_published_twice_is_one_job(queue: JobQueue, connection: Connection) -> None:
    job = new_job()
    seqs = await asyncio.gather(*(queue.publish(job) for _ in range(5)))
    assert len(set(seqs)) == 1
    assert await queue.publish(msgspec.structs.replace(job, epoch=2)) != seqs[0]
    assert (await stream_state(connection, "JOBS"))["messages"] == 2


async def test_a_withdrawn_job_is_gone(queue: JobQueue, connection: Connection) -> None:
    kept, withdrawn = new_job(), new_job()
    await queue.publish(kept)
    seq = await queue.publish(withdrawn)
    assert await queue.withdraw(seq) is True
    assert await queue.withdraw(seq) is False
    assert await _take(connection, 1) == [kept]
    assert (await stream_state(connection, "JOBS"))["messages"] == 0


async def test_a_job_that_was_taken_can_not_be_withdrawn(queue: JobQueue, connection: Connection) -> None:
    seq = await queue.publish(new_job())
    await _take(connection, 1)
    assert await queue.withdraw(seq) is False


async def test_withdrawing_an_old_job_takes_out_none_of_a_new_queue(
    nats_server: EmbeddedServer, queue: JobQueue, connection: Connection
) -> None:
    """A restarted server begins a new queue. Its client still holds the number that a job had in the old one."""
    old = await queue.publish(new_job())
    await restart(nats_server, connection)
    await ensure_streams(connection, NatsSettings())
    for _ in range(3):
        await queue.publish(new_job())
    assert await queue.withdraw(old) is False
    assert (await stream_state(connection, "JOBS"))["messages"] == 3


async def test_a_job_that_nats_would_not_take_is_the_requests_fault_and_costs_nothing(
    queue: JobQueue, connection: Connection
) -> None:
    largest = connection.max_payload - HEADERS_BYTES
    for over in (1, HEADERS_BYTES, connection.max_payload):
        with pytest.raises(BadRequest, match="larger than the queue takes"):
            await queue.publish(_job_of(largest + over))
    await queue.publish(_job_of(largest))
    assert connection.is_up
    assert connection.nc.stats["reconnects"] == 0


async def test_without_a_server_it_says_so_at_once(
    nats_server: EmbeddedServer, queue: JobQueue, connection: Connection
) -> None:
    seq = await queue.publish(new_job())
    await kill(nats_server)
    await eventually(lambda: not queue.is_up)
    watch = Stopwatch()
    with pytest.raises(QueueUnavailable):
        await queue.publish(new_job())
    assert await queue.withdraw(seq) is False
    assert watch.s < 1.0


async def test_without_a_queue_it_says_so_at_once(bare: Connection) -> None:
    publisher = Publisher(bare)
    await publisher.start()
    watch = Stopwatch()
    with pytest.raises(QueueUnavailable):
        await JobQueue(bare, publisher).publish(new_job())
    assert watch.s < 1.0
    await publisher.stop()


def _job_of(size: int) -> Job:
    bare = len(codec.encode(new_job(b'""')))
    return new_job(b'"' + b"x" * (size - bare) + b'"')


async def _take(connection: Connection, jobs: int) -> list[Job]:
    taken: list[Message] = []

    async def ensure() -> str:
        answer = await ensure_consumer(connection, "JOBS", job_consumer(route="route", lane=Lane.INTERACTIVE))
        return str(answer["name"])

    puller = Puller(connection, stream="JOBS", ensure=ensure, on_message=taken.append)
    await puller.start()
    puller.grant(jobs + 1)
    await eventually(lambda: len(taken) >= jobs)
    for message in taken:
        await connection.request(message.reply, b"+ACK", timeout_s=5.0)
    await puller.stop()
    return [codec.decode_job(message.data) for message in taken]
