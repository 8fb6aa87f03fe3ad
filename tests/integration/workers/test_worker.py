"""The worker's core: slots, what it says and when, cancelling, failing and draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from bus.connection import Connection, Message
from bus.streams import stream_state
from schemas import codec, subjects
from schemas.errors import ProviderRateLimited
from schemas.frames import Delta, Faulted, Finished, Started, Yielded
from schemas.ids import Nonce
from schemas.jobs import PRESENCE_EVERY_S, Announce, Cancel, HandedBack, Job, Lane, Resend, WorkerState
from schemas.money import Usage
from tests.integration.workers.conftest import Hire
from tests.integration.workers.rig import LAST, PIECE, ROUTE, Desk, Fake, answers, hangs, job_for, waits_for
from tests.stopwatch import Stopwatch
from tests.waiting import eventually
from workers.providers.base import Chunk

CONSUMER = subjects.job_consumer(route=ROUTE, lane=Lane.INTERACTIVE)


async def test_a_job_becomes_frames_and_a_receipt(hire: Hire, desk: Desk) -> None:
    async def behave(_: Job) -> AsyncGenerator[Chunk, None]:
        yield Chunk(members=b'{"choices":[1]}', tokens=3, upstream_id="up-1")
        usage = Usage(prompt_tokens=5, completion_tokens=3)
        yield Chunk(members=b'{"choices":[2]}', finish_reason="stop", usage=usage, usage_raw=b'{"x":1}')

    station = await hire(provider=Fake(behave))
    job = await desk.publish(model="m")
    await eventually(lambda: desk.is_done(job))
    started, *_, last = desk.of(job)
    assert isinstance(started, Started)
    assert started.worker == station.worker.id
    assert isinstance(last, Finished)
    assert (last.finish_reason, bytes(last.usage_raw)) == ("stop", b'{"x":1}')
    receipt = await eventually(lambda: desk.receipt(job))
    assert (receipt.outcome, receipt.code, receipt.finish_reason) == ("completed", None, "stop")
    assert (receipt.route, receipt.worker, receipt.provider) == (ROUTE, station.worker.id, "fake")
    assert (receipt.model, receipt.upstream_model, receipt.upstream_id) == ("m", "upstream-m", "up-1")
    assert (receipt.usage, receipt.tokens_sent) == (Usage(prompt_tokens=5, completion_tokens=3), 3)
    assert receipt.first_token_us is not None
    assert 0 < receipt.first_token_us <= receipt.duration_us
    assert (receipt.org, receipt.key_id, receipt.epoch) == (job.org, job.key_id, 1)


async def test_a_hundred_jobs_keep_to_four_slots(hire: Hire, desk: Desk) -> None:
    async def behave(_: Job) -> AsyncGenerator[Chunk, None]:
        yield PIECE
        await asyncio.sleep(0.002)
        yield LAST

    provider = Fake(behave)
    station = await hire(provider=provider, slots=4)
    jobs = await desk.publish_many(100)
    await eventually(lambda: desk.all_done(jobs), timeout_s=10.0)
    assert provider.most == 4
    assert sorted(provider.taken) == sorted(job.nonce for job in jobs)
    for job in jobs:
        assert [frame.seq for frame in desk.of(job)] == list(range(len(desk.of(job))))
        assert desk.chunks(job) == 2
    await eventually(lambda: station.idle)
    assert station.credit == 4
    await eventually(lambda: _receipts(desk, 100))
    assert {receipt.request_id for receipt in await desk.receipts()} == {job.request_id for job in jobs}
    assert (await stream_state(desk.connection, "JOBS"))["messages"] == 0


async def test_two_workers_share_the_load_and_never_a_job(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    one, other = [await hire(provider=Fake(waits_for(gate)), slots=5) for _ in range(2)]
    jobs = await desk.publish_many(30)
    await eventually(lambda: len(one.provider.running) == len(other.provider.running) == 5)
    gate.set()
    await eventually(lambda: desk.all_done(jobs))
    assert sorted(one.provider.taken + other.provider.taken) == sorted(job.nonce for job in jobs)


async def test_started_is_said_before_the_job_is_acked(hire: Hire, desk: Desk, connection: Connection) -> None:
    """The other way round, a worker that is killed in between takes the job with it: nobody has heard of it, or ever will."""
    await hire()
    said: list[str] = []

    async def listen(msg: Message) -> None:
        if msg.subject.startswith(("w.", "$JS.ACK.")):
            said.append(msg.subject.split(".", maxsplit=1)[0])

    await connection.listen(">", listen)
    for _ in range(10):
        said.clear()
        job = await desk.publish()
        await eventually(lambda job=job: said.count("w") == len(desk.of(job)) and desk.is_done(job))
        assert said[:2] == ["w", "$JS"]
        assert said.count("$JS") == 1


async def test_a_cancel_stops_the_provider_within_a_tenth_of_a_second(hire: Hire, desk: Desk) -> None:
    provider = Fake(hangs)
    station = await hire(provider=provider, slots=20)
    jobs = await desk.publish_many(20)
    await eventually(lambda: all(desk.chunks(job) for job in jobs))
    watch, began = Stopwatch(), time.monotonic()
    for job in jobs:
        await desk.cancel(job)
    await eventually(lambda: len(provider.ended_at) == 20, every_s=0.001)
    assert max(provider.ended_at.values()) - began - watch.waited_s < 0.1
    for job in jobs:
        receipt = await eventually(lambda job=job: desk.receipt(job))
        assert (receipt.outcome, receipt.code, receipt.tokens_sent) == ("cancelled", "client_left", 1)
        assert desk.kinds(job) == [Started, Delta]  # nobody listens for an end
    await eventually(lambda: station.idle)


async def test_a_cancel_of_something_else_changes_nothing(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station = await hire(provider=Fake(waits_for(gate)))
    job = await desk.publish()
    await eventually(lambda: desk.chunks(job))
    await desk.command(station.worker.id, Cancel(nonce=Nonce("f" * 32)))
    await desk.connection.say(subjects.ctl(station.worker.id), b"not a command")
    await desk.connection.say(subjects.ctl(station.worker.id), b'{"t":"of a newer release"}')
    gate.set()
    await eventually(lambda: desk.is_done(job))


async def test_a_fault_is_told_to_the_ingress_and_in_the_receipt(hire: Hire, desk: Desk) -> None:
    async def behave(_: Job) -> AsyncGenerator[Chunk, None]:
        yield PIECE
        raise ProviderRateLimited("Later.", status=429, retry_after_s=3.0)

    await hire(provider=Fake(behave))
    job = await desk.publish()
    await eventually(lambda: Faulted in desk.kinds(job))
    assert desk.kinds(job) == [Started, Delta, Faulted]
    last = desk.of(job)[-1]
    assert isinstance(last, Faulted)
    assert (last.code, last.message, last.status, last.retry_after_s) == ("upstream_rate_limited", "Later.", 429, 3.0)
    receipt = await eventually(lambda: desk.receipt(job))
    assert (receipt.outcome, receipt.code, receipt.upstream_status) == ("failed", "upstream_rate_limited", 429)


async def test_a_provider_that_does_nonsense_costs_its_own_requests_alone(hire: Hire, desk: Desk) -> None:
    async def behave(job: Job) -> AsyncGenerator[Chunk, None]:
        match job.model:
            case "raises":
                raise RuntimeError("a defect")
            case "lets a cancellation out":
                raise asyncio.CancelledError
            case "times out":
                raise TimeoutError
            case "says what is no chunk":
                yield None  # type: ignore[misc]
            case "says what can't be written":
                yield Chunk(members=b"{}", finish_reason="\ud800")
            case "says more than can be carried":
                yield Chunk(members=b'"' + b"x" * (9 * 1024 * 1024) + b'"')
            case _:
                yield PIECE
                yield LAST

    station = await hire(provider=Fake(behave), slots=2)
    names = ["raises", "lets a cancellation out", "times out", "says what is no chunk", "says what can't be written"]
    broken = [await desk.publish(model=name) for name in [*names, "says more than can be carried"]]
    sound = await desk.publish_many(20)
    await eventually(lambda: desk.all_done(sound))
    for job in broken:
        await eventually(lambda job=job: desk.kinds(job)[-1] is Faulted, what=job.model)
    await eventually(lambda: station.idle)


async def test_a_provider_without_a_name_for_a_model_costs_a_receipt_and_no_slot(hire: Hire, desk: Desk) -> None:
    class Odd(Fake):
        def upstream_model(self, model: str) -> str:
            raise KeyError(model)

    station = await hire(provider=Odd(), slots=1)
    jobs = await desk.publish_many(3)
    await eventually(lambda: desk.all_done(jobs) and station.idle)
    assert await desk.receipts() == []


async def test_an_answer_over_what_a_message_can_carry_comes_in_several(hire: Hire, desk: Desk) -> None:
    async def behave(_: Job) -> AsyncGenerator[Chunk, None]:
        for _ in range(20):
            yield Chunk(members=b'"' + b"x" * (1024 * 1024) + b'"')

    await hire(provider=Fake(behave))
    job = await desk.publish()
    await eventually(lambda: desk.is_done(job))
    assert desk.chunks(job) == 20


async def test_frames_are_said_again_to_an_ingress_that_missed_some(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station = await hire(provider=Fake(waits_for(gate)))
    job = await desk.publish()
    await eventually(lambda: desk.chunks(job))
    await desk.command(station.worker.id, Resend(nonce=job.nonce, seq=0))
    await eventually(lambda: desk.kinds(job) == [Started, Delta, Started, Delta])
    gate.set()
    await eventually(lambda: desk.is_done(job))
    desk.frames.clear()
    await desk.command(station.worker.id, Resend(nonce=job.nonce, seq=2))  # it has ended just now
    await eventually(lambda: desk.kinds(job) == [Finished])


async def test_a_job_delivered_again_while_it_runs_is_one_attempt(hire: Hire, desk: Desk) -> None:
    """Its ack was lost on the way. Run twice it would cost twice, mix two answers under one nonce and lose a slot for ever."""
    gate = asyncio.Event()
    station = await hire(provider=Fake(waits_for(gate)), slots=3)
    job = job_for()
    subject = subjects.job(model=job.model, route=job.route, lane=Lane.INTERACTIVE, org=job.org)
    for _ in range(3):  # no message id: three deliveries of the same attempt
        await desk.publisher.publish(subject, codec.encode(job), timeout_s=5.0)
    others = await desk.publish_many(2)
    await eventually(lambda: len(station.provider.running) == 3)
    gate.set()
    await eventually(lambda: desk.all_done([job, *others]))
    await desk.publisher.publish(subject, codec.encode(job), timeout_s=5.0)  # and once more, when it is over
    await eventually(lambda: _jobs(desk, 0))
    assert station.provider.taken.count(job.nonce) == 1
    assert [frame.seq for frame in desk.of(job)] == list(range(len(desk.of(job))))
    await eventually(lambda: station.idle)
    assert station.credit == 3


async def test_a_job_that_only_a_newer_release_can_read_is_left_to_one(hire: Hire, desk: Desk) -> None:
    station = await hire(slots=2)
    subject = subjects.job(model="m", route=ROUTE, lane=Lane.INTERACTIVE, org="org")
    for body in (b"{}", b"not json", b""):
        await desk.publisher.publish(subject, body, timeout_s=5.0)
    jobs = await desk.publish_many(10)
    await eventually(lambda: desk.all_done(jobs))
    await eventually(lambda: _jobs(desk, 3), what="the other acks")
    assert station.provider.most <= 2
    info = await desk.connection.api(f"CONSUMER.INFO.JOBS.{CONSUMER}")
    assert info["delivered"]["consumer_seq"] <= 20  # not taken again and again in a hurry


@pytest.mark.parametrize("why", ["cancel", "hand back"])
async def test_an_attempt_stopped_before_its_first_step_says_so(why: str, hire: Hire, desk: Desk) -> None:
    """The command comes in the very turn of the delivery: a task cancelled then would run none of its body."""
    station, job = await hire(), job_for()
    station.deliver(job)
    assert station.route.free == station.route.slots - 1
    if why == "cancel":
        await station.worker._on_command(Message(_client=None, data=codec.encode(Cancel(nonce=job.nonce))))
    else:
        station.worker._stop(station.worker._running[job.nonce], HandedBack(reason="worker_draining"))
    receipt = await eventually(lambda: desk.receipt(job))
    assert receipt.outcome == ("cancelled" if why == "cancel" else "handed_back")
    assert desk.kinds(job) == ([Started] if why == "cancel" else [Started, Yielded])
    assert station.provider.taken == []
    assert station.idle


async def test_a_task_that_is_cancelled_before_its_first_step_frees_its_slot(hire: Hire, desk: Desk) -> None:
    station, job = await hire(), job_for()
    station.deliver(job)
    station.worker._running[job.nonce].task.cancel()
    await eventually(lambda: station.idle)


async def test_draining_finishes_what_runs_and_takes_nothing_new(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station = await hire(provider=Fake(waits_for(gate)), slots=3)
    running = await desk.publish_many(3)
    await eventually(lambda: len(station.provider.running) == 3)
    draining = asyncio.create_task(station.worker.drain())
    await eventually(lambda: desk.presence[-1].state is WorkerState.DRAINING)
    late = await desk.publish()
    assert not draining.done()
    gate.set()
    await draining
    await eventually(lambda: desk.all_done(running))
    assert desk.of(late) == []
    await eventually(lambda: _jobs(desk, 1), what="the other acks")
    assert len(await desk.receipts()) == 3  # recorded before the worker is gone
    await eventually(lambda: desk.presence[-1].state is WorkerState.GONE)
    info = await desk.connection.api(f"CONSUMER.INFO.JOBS.{CONSUMER}")
    assert (info["num_waiting"], info["num_ack_pending"]) == (0, 0)


async def test_what_does_not_finish_in_time_is_handed_back(hire: Hire, desk: Desk) -> None:
    station = await hire(provider=Fake(hangs), slots=3, drain_s=0.3)
    jobs = await desk.publish_many(3)
    await eventually(lambda: len(station.provider.running) == 3)
    watch = Stopwatch()
    await station.worker.drain()
    assert watch.wall_s > 0.25
    assert watch.s < 1.5
    for job in jobs:
        await eventually(lambda job=job: desk.kinds(job) == [Started, Delta, Yielded])
        receipt = await desk.receipt(job)
        assert receipt is not None
        assert (receipt.outcome, receipt.code) == ("handed_back", "worker_draining")


async def test_jobs_that_meet_a_draining_worker_go_to_another_at_once(hire: Hire, desk: Desk) -> None:
    """Not after ack_wait: what had been sent to it is given back, and nothing is leased to an inbox that nobody reads."""
    leaving, staying = await hire(slots=50), await hire(slots=50)
    jobs: list[Job] = []

    async def publish() -> None:
        while len(jobs) < 400:
            jobs.extend(await desk.publish_many(10))

    publishing = asyncio.create_task(publish())
    await eventually(lambda: len(leaving.provider.taken) > 20, every_s=0)
    await leaving.worker.drain()
    await publishing
    await eventually(lambda: desk.all_done(jobs), timeout_s=3.0)
    assert sorted(leaving.provider.taken + staying.provider.taken) == sorted(job.nonce for job in jobs)
    for job in jobs:
        assert desk.kinds(job).count(Started) == 1


async def test_a_worker_says_regularly_and_when_asked_who_it_is(hire: Hire, desk: Desk) -> None:
    gate = asyncio.Event()
    station = await hire(provider=Fake(waits_for(gate)), slots=7)
    await eventually(lambda: len(desk.presence) == 2)
    assert desk.presence[0].state is WorkerState.GONE, "whoever had its name before"
    (offer,) = desk.presence[1].routes
    assert (desk.presence[1].worker, desk.presence[1].state) == (station.worker.id, WorkerState.SERVING)
    assert (offer.route, offer.provider, offer.slots, offer.free) == (ROUTE, "fake", 7, 7)
    assert [model.name for model in offer.models] == ["m"]
    jobs = await desk.publish_many(2)
    await eventually(lambda: len(station.provider.running) == 2)
    before = len(desk.presence)
    watch = Stopwatch()
    await desk.connection.say(subjects.EVERY_WORKER, codec.encode(Announce()))
    await eventually(lambda: len(desk.presence) > before)
    assert watch.s < 0.2
    assert desk.presence[-1].routes[0].free == 5
    await eventually(lambda: len(desk.presence) >= before + 3, timeout_s=3 * PRESENCE_EVERY_S)
    gap = desk.presence_at[before + 2] - desk.presence_at[before + 1]
    late_s = watch.waited_s
    assert PRESENCE_EVERY_S - 0.5 - late_s < gap < PRESENCE_EVERY_S + 0.5 + late_s
    gate.set()
    await eventually(lambda: desk.all_done(jobs))
    await station.worker.drain()
    await eventually(lambda: desk.presence[-1].state is WorkerState.GONE)
    states = [presence.state for presence in desk.presence[1:]]
    assert states == sorted(states, key=list(WorkerState).index)


async def test_a_route_that_can_not_serve_takes_nothing_until_it_can(hire: Hire, desk: Desk) -> None:
    station = await hire(slots=2)
    station.provider.tell("engine_starting")
    await eventually(lambda: desk.presence[-1].routes[0].down == "engine_starting")
    jobs = await desk.publish_many(5)
    await eventually(lambda: _jobs(desk, 5))
    assert station.provider.taken == []
    station.provider.tell(None)
    await eventually(lambda: desk.all_done(jobs))
    await eventually(lambda: desk.presence[-1].routes[0].down is None)


async def test_no_slot_is_lost_whatever_becomes_of_the_jobs(hire: Hire, desk: Desk) -> None:
    """Answers, faults, defects, cancels at every moment, twice and too late, all at once."""

    async def behave(job: Job) -> AsyncGenerator[Chunk, None]:
        match int(job.model) % 6:
            case 0:
                raise ProviderRateLimited
            case 1:
                yield PIECE
                raise RuntimeError
            case 2:
                yield PIECE
                await asyncio.Event().wait()
            case 3:
                await asyncio.Event().wait()
            case _:
                async for chunk in answers(job):
                    yield chunk

    station = await hire(provider=Fake(behave), slots=5)
    jobs = [await desk.publish(model=str(number)) for number in range(120)]

    async def cancel(job: Job) -> None:
        if int(job.model) % 6 in (2, 3, 4):
            await eventually(lambda: Started in desk.kinds(job), timeout_s=20.0)
            await desk.cancel(job)
            await desk.cancel(job)

    await asyncio.gather(*(cancel(job) for job in jobs))
    await eventually(lambda: station.idle and len(station.provider.ended_at) >= 100)
    await eventually(lambda: _receipts(desk, 120))
    assert station.provider.most <= 5
    assert station.credit == 5
    outcomes = {receipt.request_id: receipt.outcome for receipt in await desk.receipts()}
    assert len(outcomes) == 120
    for job in jobs:
        expected = {0: {"failed"}, 1: {"failed"}, 2: {"cancelled"}, 3: {"cancelled"}, 5: {"completed"}}
        assert outcomes[job.request_id] in expected.get(int(job.model) % 6, {"completed", "cancelled"})


async def _jobs(desk: Desk, waiting: int) -> bool:
    return bool((await stream_state(desk.connection, "JOBS"))["messages"] == waiting)


async def _receipts(desk: Desk, count: int) -> bool:
    return len(await desk.receipts()) == count
