"""The worker when NATS goes away and comes back, and when another worker dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bus import streams
from bus.connection import API_TIMEOUT_S, BusUnavailable, Message, connect
from bus.puller import Puller
from bus.server import EmbeddedServer
from bus.streams import ACK_WAIT_S, ensure_consumer, ensure_streams, job_consumer
from schemas.frames import Delta, Finished, Started
from schemas.ids import RouteId
from schemas.jobs import PRESENCE_EVERY_S, Job, Lane, Resend, WorkerState
from schemas.settings import NatsSettings
from tests.integration.workers.conftest import Hire
from tests.integration.workers.rig import LAST, PIECE, ROUTE, Desk, Fake, Line, Station, hangs, job_for, waits_for
from tests.restarts import kill, restart
from tests.stopwatch import Stopwatch
from tests.waiting import eventually
from workers import worker
from workers.providers.base import Chunk

FURTHER_ROUTES = 150  # to open them takes longer than for a job to come


async def test_a_job_that_a_worker_took_with_it_is_delivered_again(
    nats_server: EmbeddedServer, hire: Hire, desk: Desk
) -> None:
    """Killed between the pull and Started: nobody has heard of the attempt, so the queue itself gives it to another."""
    doomed = await connect(nats_server.url, name="doomed")
    taken: list[Message] = []

    def take(message: Message) -> None:
        taken.append(message)

    async def ensure() -> str:
        return str((await ensure_consumer(doomed, "JOBS", job_consumer(route=ROUTE, lane=Lane.INTERACTIVE)))["name"])

    puller = Puller(doomed, stream="JOBS", ensure=ensure, on_message=take)
    await puller.start()
    puller.grant(10)
    jobs = await desk.publish_many(3)
    watch = Stopwatch()
    await eventually(lambda: len(taken) == 3)
    doomed.nc._transport._io_writer.transport.abort()
    await doomed.nc.close()
    await puller.stop()
    await hire()
    await eventually(lambda: desk.all_done(jobs), timeout_s=ACK_WAIT_S + 3.0)
    assert watch.wall_s > ACK_WAIT_S - 0.5
    assert watch.s < ACK_WAIT_S + 1.5


async def test_it_serves_again_by_itself_when_nats_was_restarted(
    nats_server: EmbeddedServer, hire: Hire, desk: Desk
) -> None:
    """Queue and consumer were in the server's memory: it makes them again."""
    station = await hire()
    for _ in range(3):
        await restart(nats_server, desk.connection)
        await ensure_streams(desk.connection, NatsSettings())
        jobs = await desk.publish_many(10)
        watch = Stopwatch()
        await eventually(lambda jobs=jobs: desk.all_done(jobs))
        assert watch.s < 1.0
    assert station.idle
    await eventually(lambda: station.credit == station.route.slots)
    assert len(station.provider.taken) == 30


async def test_a_restart_at_work_costs_no_frame_no_receipt_and_no_slot(
    nats_server: EmbeddedServer, hire: Hire, desk: Desk
) -> None:
    async def behave(_: Job) -> AsyncGenerator[Chunk, None]:
        for _ in range(300):
            yield PIECE
            await asyncio.sleep(0.002)
        yield LAST

    station = await hire(provider=Fake(behave))
    jobs = await desk.publish_many(4)
    await eventually(lambda: all(desk.chunks(job) > 10 for job in jobs))
    await restart(nats_server)
    await eventually(lambda: desk.all_done(jobs))
    for job in jobs:
        await desk.command(station.worker.id, Resend(nonce=job.nonce, seq=0))
        await eventually(lambda job=job: _chunks_of_distinct_frames(desk, job) == 301)
        assert (await eventually(lambda job=job: desk.receipt(job))).outcome == "completed"
    await eventually(lambda: station.idle and station.credit == 4)


async def _hired_while_nats_falls_silent(hire: Hire, line: Line, gate: asyncio.Event) -> asyncio.Task[Station]:
    """It has begun a job of its first route, and is opening the others, when what it says to NATS is lost."""

    async def behave(_: Job) -> AsyncGenerator[Chunk, None]:
        line.swallows = True
        yield PIECE
        await gate.wait()
        yield LAST

    hired = hire(url=await line.open(), provider=Fake(behave), further=FURTHER_ROUTES, drain_s=0.2)
    hiring = asyncio.ensure_future(hired)
    await eventually(lambda: line.swallows, what="the job has begun")
    return hiring


async def test_what_nats_does_not_answer_while_a_worker_starts_is_asked_again(
    nats_server: EmbeddedServer, hire: Hire, desk: Desk
) -> None:
    line, gate = Line(nats_server), asyncio.Event()
    job = await desk.publish()
    hiring = await _hired_while_nats_falls_silent(hire, line, gate)
    await asyncio.sleep(API_TIMEOUT_S + 0.3)
    assert not hiring.done()
    line.swallows = False
    gate.set()
    station = await hiring
    assert len(station.worker.routes()) == FURTHER_ROUTES + 1
    await eventually(lambda: desk.is_done(job))
    last = await desk.publish(route=station.worker.routes()[-1])
    await eventually(lambda: desk.is_done(last))
    assert (await eventually(lambda: desk.receipt(job))).outcome == "completed"
    await line.close()


async def test_a_worker_is_heard_while_nats_keeps_one_of_its_routes_waiting(
    nats_server: EmbeddedServer, hire: Hire, desk: Desk
) -> None:
    """Else its ingress would take it for lost, with what it has begun."""
    line, gate = Line(nats_server, only=b"$JS.API.CONSUMER"), asyncio.Event()
    job = await desk.publish()
    hiring = await _hired_while_nats_falls_silent(hire, line, gate)
    await eventually(lambda: desk.kinds(job) == [Started, Delta])
    before = len(desk.presence)
    await asyncio.sleep(2 * PRESENCE_EVERY_S + 0.3)
    assert not hiring.done()
    heard = desk.presence[before:]
    assert len(heard) == 2
    assert all(each.state is WorkerState.SERVING for each in heard)
    assert all(0 < len(each.routes) <= FURTHER_ROUTES for each in heard)
    line.swallows = False
    gate.set()
    await hiring
    await eventually(lambda: desk.is_done(job))
    await eventually(lambda: len(desk.presence[-1].routes) == FURTHER_ROUTES + 1)
    await line.close()


async def test_a_worker_that_gives_up_while_it_starts_leaves_a_receipt_for_what_it_had_begun(
    nats_server: EmbeddedServer, hire: Hire, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LEADERS_WAIT_S", 0.0)
    line, gate = Line(nats_server), asyncio.Event()
    job = await desk.publish()
    hiring = await _hired_while_nats_falls_silent(hire, line, gate)
    asyncio.get_running_loop().call_later(API_TIMEOUT_S + 0.5, setattr, line, "swallows", False)
    with pytest.raises(BusUnavailable):
        await hiring
    receipt = await eventually(lambda: desk.receipt(job))
    assert (receipt.outcome, receipt.tokens_sent) == ("handed_back", 1)
    await line.close()


@pytest.mark.parametrize("draining", [False, True])
async def test_a_last_frame_that_was_lost_with_the_connection_is_said_again(
    draining: bool, nats_server: EmbeddedServer, hire: Hire, desk: Desk
) -> None:
    """It was written into a cable that was cut. The ingress can't miss the number of what was to be the last."""
    gate, line = asyncio.Event(), Line(nats_server)
    station = await hire(url=await line.open(), provider=Fake(waits_for(gate)))
    job = await desk.publish()
    await eventually(lambda: desk.kinds(job) == [Started, Delta])
    drained = asyncio.create_task(station.worker.drain()) if draining else None
    if draining:
        await eventually(lambda: not station.pullers)
    line.swallows = True
    gate.set()
    await eventually(lambda: station.idle)
    await eventually(lambda: line.swallowed > 100, what="the loss of the frame")
    assert Finished not in desk.kinds(job)
    await asyncio.sleep(0.05)  # of its drain nothing is left but that its receipt waits for the log
    line.swallows = False
    line.cut()
    await eventually(lambda: Finished in desk.kinds(job))
    if drained is not None:
        await drained
    assert (await eventually(lambda: desk.receipt(job))).outcome == "completed"
    await station.close()
    await line.close()


async def test_jobs_come_once_each_over_lost_connections(hire: Hire, desk: Desk) -> None:
    station = await hire(slots=8)
    jobs: list[Job] = []
    for _ in range(4):
        jobs += await desk.publish_many(50)
        station.connection.nc._transport._io_writer.transport.abort()
    await eventually(lambda: desk.all_done(jobs), timeout_s=ACK_WAIT_S + 5.0)
    assert sorted(station.provider.taken) == sorted(job.nonce for job in jobs)
    assert station.provider.most <= 8
    await eventually(lambda: station.idle and station.credit == 8)


async def test_draining_without_nats_ends_all_the_same(nats_server: EmbeddedServer, hire: Hire, desk: Desk) -> None:
    station = await hire(provider=Fake(hangs), drain_s=0.1)
    job = await desk.publish()
    await eventually(lambda: desk.chunks(job))
    await kill(nats_server)
    watch = Stopwatch()
    await station.worker.drain()
    assert watch.s < 5.0  # most of it for the receipt, which may yet be recorded
    assert not station.provider.running
    await nats_server.start()
    await eventually(lambda: desk.connection.is_up)
    assert (await eventually(lambda: desk.receipt(job))).outcome == "handed_back"


async def test_receipts_wait_for_the_log_as_long_as_a_drain_may_take(
    nats_server: EmbeddedServer, hire: Hire, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seconds were all they had, however soon the work was done: then the only one who knew of them was gone."""
    monkeypatch.setattr(worker, "FLUSH_WAIT_S", 0.0)
    gate = asyncio.Event()
    station = await hire(provider=Fake(waits_for(gate)), drain_s=10.0)
    job = await desk.publish()
    await eventually(lambda: desk.chunks(job))
    await kill(nats_server)
    gate.set()
    draining = asyncio.create_task(station.worker.drain())
    await eventually(lambda: station.idle)
    await asyncio.sleep(0.3)
    assert not draining.done()
    await nats_server.start()
    await draining
    await eventually(lambda: desk.connection.is_up)
    assert (await eventually(lambda: desk.receipt(job))).outcome == "completed"


async def test_a_second_signal_ends_a_draining_process_at_once(
    nats_server: EmbeddedServer, desk: Desk, tmp_path: Path
) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text('[[routes]]\nid = "slow"\nprovider = "echo"\ntokens_per_s = 0.1\n[[routes.models]]\nname = "m"\n')
    with _process(nats_server, config, tmp_path) as process:
        await eventually((tmp_path / "ready").exists, timeout_s=15.0)
        job = job_for(route=RouteId("slow"), model="m")
        await desk.queue.publish(job)
        await eventually(lambda: Started in desk.kinds(job))
        process.send_signal(signal.SIGTERM)
        await eventually(lambda: desk.presence[-1].state == "draining")
        assert process.poll() is None
        watch = Stopwatch()
        process.send_signal(signal.SIGTERM)
        await eventually(lambda: process.poll() is not None)
        assert watch.s < 2.0
        assert process.returncode == 0


def _chunks_of_distinct_frames(desk: Desk, job: Job) -> int:
    distinct = {frame.seq: frame for frame in desk.of(job)}
    assert sorted(distinct) == list(range(len(distinct)))
    return sum(len(frame.chunks) for frame in distinct.values() if isinstance(frame, Delta | Finished))


@contextmanager
def _process(server: EmbeddedServer, config: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``penstock worker``; killed at the end if it is still there."""
    arguments = ["worker", "--config", str(config), "--route", "slow", "--ready-file", str(tmp_path / "ready")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock", *arguments], env={**os.environ, "PENSTOCK_NATS": server.url}, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
