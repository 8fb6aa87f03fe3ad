"""Requests that outlive their connections, with the queue, the log and the worker in the test's hands."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from bus.connection import BusUnavailable
from ingress.app import _to_its_end
from ingress.neighbours import FarReader
from ingress.reader import Client as HttpClient
from ingress.reader import follow
from schemas.again import Ask, Page
from schemas.events import RequestReplayed
from schemas.ids import KeyId, OrgId, RequestId, new_id
from schemas.settings import IngressSettings
from tests.unit.ingress.doubles import BODY, INGRESS, KEY, STREAM_BODY, Bench, Client, turns
from tests.waiting import eventually

KEYED = {"Idempotency-Key": "k"}


def _code(client: Client) -> str:
    return str(msgspec.json.decode(client.body.rpartition(b"data: ")[2])["error"]["code"])


@pytest.mark.parametrize("body", [BODY, STREAM_BODY], ids=["whole", "stream"])
async def test_the_last_byte_waits_for_the_closing_event_for_every_reader(body: bytes) -> None:
    bench, first, second = Bench(), Client(body), Client(body)
    tasks = [await bench.serve(first, headers=KEYED)]
    job = await bench.job()
    tasks.append(await bench.serve(second, headers=KEYED))
    bench.start(job)
    await turns()
    bench.log.open.clear()
    bench.finish(job, 1, text="a")
    await eventually(lambda: "request.finished" in bench.log.kinds(), every_s=0)
    await turns()
    assert not first.is_over
    assert not second.is_over
    bench.log.open.set()
    await asyncio.gather(*tasks)
    assert first.body == second.body
    assert len(bench.queue.jobs) == 1


async def test_what_is_finished_is_told_again_when_the_queue_is_away_and_nobody_serves_the_model() -> None:
    bench, first, second = Bench(), Client(), Client()
    task = await bench.serve(first, headers=KEYED)
    job = await bench.job()
    bench.start(job)
    bench.finish(job, 1, text="a")
    await task
    bench.queue.is_up = False
    await (await bench.serve(second, headers=KEYED))
    assert second.status == 200
    assert second.body == first.body
    (told,) = [event for event in bench.log.events if isinstance(event, RequestReplayed)]
    assert (told.request_id, told.running) == (job.request_id, False)


async def test_a_refusal_before_any_work_leaves_the_key_free() -> None:
    bench, first, second = Bench(), Client(), Client()
    bench.queue.is_up = False
    await (await bench.serve(first, headers=KEYED))
    assert first.status == 503
    bench.queue.is_up = True
    task = await bench.serve(second, headers=KEYED)
    job = await bench.job()
    bench.start(job)
    bench.finish(job, 1, text="a")
    await task
    assert second.status == 200


async def test_a_client_that_does_not_read_does_not_stop_the_work() -> None:
    bench, stuck, other = Bench(max_bytes=10), Client(STREAM_BODY), Client(STREAM_BODY)
    stuck.writable.clear()
    tasks = [await bench.serve(stuck, headers=KEYED)]
    job = await bench.job()
    tasks.append(await bench.serve(other, headers=KEYED))
    bench.start(job)
    for seq in range(1, 20):
        bench.say(job, seq, "x")
        await turns(5)
    bench.finish(job, 20)
    await tasks[1]
    assert b"[DONE]" in other.body
    assert bench.log.finished.status == "completed"
    stuck.writable.set()
    await tasks[0]
    assert stuck.body == other.body


async def test_a_drain_waits_for_a_request_whose_client_is_away_and_its_end_is_recorded() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client, headers=KEYED)
    job = await bench.job()
    bench.start(job)
    client.leave()
    await task
    assert len(bench.tasks) == 1  # the server waits for it
    assert bench.chat._held_bytes == len(STREAM_BODY)
    bench.finish(job, 1, text="a")
    await asyncio.gather(*bench.tasks)
    await turns()
    assert bench.chat._held_bytes == 0
    assert bench.log.finished.status == "completed"


async def test_when_the_drain_is_over_whoever_is_attached_is_told_so() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client, headers=KEYED)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    await eventually(lambda: b'"content":"a"' in client.body)
    for running in (*bench.tasks, task):
        running.cancel()
    await task
    assert _code(client) == "stopping"
    assert client.is_over
    assert (bench.log.finished.status, bench.log.finished.code) == ("failed", "stopping")


async def test_what_a_slow_client_was_being_told_at_the_end_of_the_drain_is_not_left_out() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client, headers=KEYED)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    await eventually(lambda: b'"content":"a"' in client.body)
    client.writable.clear()
    bench.say(job, 2, "b")
    await turns()
    for running in (*bench.tasks, task):
        running.cancel()
    await turns()
    client.writable.set()
    await task
    assert b'"content":"b"' in client.body
    ids = [int(line[4:]) for line in client.body.split(b"\n") if line.startswith(b"id: ")]
    assert ids == [1, 2, 3]
    assert _code(client) == "stopping"


class Silent:
    """All other ingresses, while NATS is away."""

    async def look(self, *_: object) -> None:
        await asyncio.Event().wait()

    async def find(self, *_: object, **__: object) -> None:
        await asyncio.Event().wait()


async def test_who_waits_for_the_others_at_the_end_of_the_drain_is_told_what_is_recorded() -> None:
    """It was told that it had been cancelled, and the ledger knew nothing of it."""
    bench, client = Bench(), Client(STREAM_BODY)
    bench.chat.replays._elsewhere = Silent()  # type: ignore[assignment]
    task = await bench.serve(client, headers=KEYED)
    await turns()
    for running in (*bench.tasks, task):
        running.cancel()
    await task
    assert (client.status, _code(client)) == (503, "stopping")
    assert (bench.log.rejected.code, bench.log.rejected.http_status) == ("stopping", 503)


async def test_who_asks_for_an_answer_of_another_ingress_at_the_end_of_the_drain_hears_that_it_stops() -> None:
    bench, client = Bench(), Client()
    bench.chat.replays._neighbours = Silent()  # type: ignore[assignment]
    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "GET", "headers": headers, "path_params": {"completion_id": new_id()}}
    task = asyncio.create_task(_to_its_end(bench.chat.replays.resume, scope, client.receive, client.send))
    await turns()
    task.cancel()
    await task
    assert client.status == 503
    assert b'"stopping"' in client.body


class Gone:
    """Neighbours of whom none answers any more."""

    async def ask(self, *_: object) -> Page:
        raise BusUnavailable


async def test_a_reader_is_cut_off_when_the_ingress_that_has_its_answer_goes_away() -> None:
    """It may not take what came for the whole."""
    client = Client()
    ask = Ask(request_id=RequestId("r"), org=OrgId("o"), key_id=KeyId("k"))
    page = Page(ingress=INGRESS, status=200, body=b"id: 1\ndata: 1\n\n", last=1)
    far = FarReader(Gone(), ask, page)  # type: ignore[arg-type]
    await follow(far, HttpClient({"state": {"penstock.cut": client.cut_off}}, client.receive, client.send))  # type: ignore[typeddict-item]
    assert client.body == page.body
    assert client.cut
    assert not client.is_over


async def test_requests_without_clients_count_against_the_bound() -> None:
    bench, first, second = Bench(settings=IngressSettings(max_concurrent_requests=1)), Client(), Client()
    task = await bench.serve(first, headers=KEYED)
    job = await bench.job()
    first.leave()
    await task
    await (await bench.serve(second))
    assert (second.status, _code(second)) == (503, "overloaded")
    bench.start(job)
    bench.finish(job, 1, text="a")
    await asyncio.gather(*bench.tasks)
