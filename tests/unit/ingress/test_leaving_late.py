"""A client that leaves at the very end: what it was given is billed, whatever it did not wait for."""

from __future__ import annotations

import pytest

from schemas.frames import Faulted, Started
from schemas.ids import WorkerId
from schemas.jobs import Cancel
from schemas.money import Usage
from tests.unit.ingress.doubles import BODY, STREAM_BODY, Bench, Client, turns
from tests.waiting import eventually

OTHER = WorkerId("worker-b")


def _cancels(bench: Bench) -> list[str]:
    return [command.reason for _, command in bench.wall.commands if isinstance(command, Cancel)]


async def test_between_the_last_token_and_the_end_it_pays_for_all_that_it_read() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a", "b", "c")
    await eventually(lambda: b'"content":"c"' in client.body)
    client.leave()
    await turns(2)
    await task
    assert (bench.log.finished.status, bench.log.finished.code) == ("cancelled", "client_left")
    assert (bench.log.finished.usage.completion_tokens, bench.log.finished.estimated) == (3, True)
    assert bench.log.finished.cost_pico > 0
    await turns()
    assert _cancels(bench) == ["client_left"]


async def test_in_the_turn_in_which_the_end_comes_it_pays_for_all_that_it_read() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a", "b", "c")
    await eventually(lambda: b'"content":"c"' in client.body)
    client.leave()
    bench.finish(job, 2)
    await task
    assert bench.log.finished.status in ("cancelled", "completed")  # by whoever is seen first
    assert bench.log.finished.usage.completion_tokens == 3
    assert bench.log.finished.cost_pico > 0


@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
async def test_just_before_the_closing_event_is_durable_it_pays_for_the_whole(body: bytes) -> None:
    bench, client = Bench(), Client(body)
    task = await bench.serve_until_recorded(client)
    client.leave()
    await turns()
    bench.log.open.set()
    await task
    assert (bench.log.finished.status, bench.log.finished.usage.completion_tokens) == ("completed", 1)
    assert bench.log.finished.cost_pico > 0
    assert bench.log.kinds().count("request.finished") == 1


async def test_before_the_first_word_but_after_the_role_it_pays_for_its_prompt() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.role(job, 1)
    await turns()
    assert client.sent == []
    client.leave()
    await task
    usage = bench.log.finished.usage
    assert (bench.log.finished.status, usage.completion_tokens) == ("cancelled", 0)
    assert usage.prompt_tokens > 0


async def test_after_its_first_route_failed_and_before_the_second_began_it_pays_nothing() -> None:
    bench, client = Bench(routes=("r1", "r2")), Client(STREAM_BODY)
    task = await bench.serve(client)
    first = await bench.job()
    bench.start(first)
    bench.feed(first, Faulted(request_id=first.request_id, epoch=1, seq=1, code="upstream_error", message="broke"))
    await bench.job(2)
    client.leave()
    await task
    await turns()
    assert (bench.log.finished.status, bench.log.finished.usage) == ("cancelled", Usage())
    assert bench.queue.withdrawn == [2]
    assert len(bench.switchboard) == 0


async def test_as_its_first_route_fails_nothing_more_is_begun() -> None:
    bench, client = Bench(routes=("r1", "r2")), Client(STREAM_BODY)
    task = await bench.serve(client)
    first = await bench.job()
    bench.start(first)
    await turns()
    client.leave()
    relay = bench.relay(first)
    relay.feed(
        Faulted(request_id=first.request_id, epoch=1, seq=1, code="upstream_error", message="broke"),
        1,
        worker=WorkerId("worker-a"),
    )
    await task
    await turns()
    assert bench.log.finished.status == "cancelled"
    assert len(bench.queue.jobs) - len(bench.queue.withdrawn) == 1
    assert len(bench.switchboard) == 0


async def test_a_late_word_of_an_attempt_that_was_given_up_is_not_in_the_answer() -> None:
    bench, client = Bench(routes=("r1", "r2")), Client(STREAM_BODY)
    await bench.switchboard.start()
    task = await bench.serve(client)
    first = await bench.job()
    bench.start(first)
    bench.role(first, 1)
    old = bench.relay(first)
    bench.feed(first, Faulted(request_id=first.request_id, epoch=1, seq=2, code="upstream_error", message="broke"))
    second = await bench.job(2)
    assert first.nonce not in bench.switchboard._relays
    bench.start(second, worker=OTHER)
    frame = Started(request_id=first.request_id, epoch=1, seq=3, worker=WorkerId("worker-a"))
    old.feed(frame, 1, worker=WorkerId("worker-a"))
    bench.finish(second, 1, text="kept", worker=OTHER)
    await task
    assert b"kept" in client.body
    assert client.body.count(b'"role"') <= 1  # the first route's role went with it
    assert bench.log.finished.route == "r2"
