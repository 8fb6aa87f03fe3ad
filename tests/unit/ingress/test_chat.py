"""One request at the ASGI boundary, with the queue, the log and the worker in the test's hands: every order of events."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from msgspec import Raw

from ingress import books
from ingress.policy.trail import LOST_MAX
from ingress.problems import CLIENT_LEFT_STATUS
from ingress.receipts import Receipts
from schemas import codec, subjects
from schemas.errors import BacklogFull, QueueUnavailable, WorkerLost
from schemas.frames import Delta, Faulted, Started, Yielded
from schemas.ids import WorkerId
from schemas.jobs import Cancel, Job, Timeouts
from schemas.money import Usage
from schemas.settings import IngressSettings
from tests.unit.ingress.doubles import BODY, INGRESS, STREAM_BODY, WORKER, Bench, Client, Message, turns
from tests.waiting import eventually

OTHER = WorkerId("worker-b")


def _error_code(client: Client) -> str:
    told = msgspec.json.decode(client.body.rpartition(b"data: ")[2])
    return str(told["error"]["code"])


def _cancels(bench: Bench) -> list[str]:
    return [command.reason for _, command in bench.wall.commands if isinstance(command, Cancel)]


async def test_no_byte_goes_out_before_the_acceptance_is_on_record() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    bench.log.open.clear()
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    await turns()
    assert client.sent == []
    bench.log.open.set()
    await eventually(lambda: b'"content":"a"' in client.body)
    bench.finish(job, 2)
    await task


@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
async def test_the_last_byte_goes_out_after_the_closing_event(body: bytes) -> None:
    bench, client = Bench(), Client(body)
    task = await bench.serve_until_recorded(client)
    await turns()
    assert not client.is_over
    assert b"[DONE]" not in client.body
    bench.log.open.set()
    await task
    assert client.is_over
    assert (b"[DONE]" in client.body) is (body is STREAM_BODY)


async def test_a_usage_that_the_provider_did_not_write_itself_is_told_all_the_same() -> None:
    """Such as the one of docs/providers.md's example: it counts, and writes no JSON of it."""
    bench, client = Bench(), Client(BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.finish(job, 1, text="a", usage=Usage(prompt_tokens=7, completion_tokens=3))
    await task
    told = msgspec.json.decode(client.body)["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (7, 3, 10)


async def test_a_client_that_leaves_while_the_job_is_published_has_it_withdrawn() -> None:
    bench, client = Bench(), Client()
    bench.queue.open.clear()
    task = await bench.serve(client)
    await turns()
    client.leave()
    await turns()
    bench.queue.open.set()
    await task
    await turns()
    assert bench.queue.withdrawn == [1]
    assert client.sent == []
    assert bench.log.finished.status == "cancelled"
    assert bench.log.finished.usage == Usage()
    assert len(bench.switchboard) == 0


async def test_a_client_that_leaves_while_the_acceptance_is_written_stops_the_worker_and_pays_for_its_prompt() -> None:
    """The worker has begun, though nobody has taken the frame that says so yet."""
    bench, client = Bench(), Client()
    bench.log.open.clear()
    task = await bench.serve(client)
    bench.start(await bench.job())
    client.leave()
    await turns()
    bench.log.open.set()
    await task
    await turns()
    assert _cancels(bench) == ["client_left"]
    assert bench.log.finished.usage.prompt_tokens > 0
    assert bench.log.finished.worker == WORKER
    assert bench.log.kinds() == ["request.accepted", "attempt.started", "request.finished"]


async def test_a_client_that_leaves_stops_the_worker_and_hears_nothing_more() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a", "b")
    await eventually(lambda: b'"content":"b"' in client.body)
    client.leave()
    await task
    await turns()
    assert _cancels(bench) == ["client_left"]
    event = bench.log.finished
    assert (event.status, event.http_status, event.code) == ("cancelled", CLIENT_LEFT_STATUS, "client_left")
    assert (event.usage.completion_tokens, event.estimated) == (2, True)
    assert not client.is_over
    assert len(bench.switchboard) == 0


async def test_tokens_that_were_never_delivered_are_not_billed_to_a_client_that_left() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    await eventually(lambda: b'"content":"a"' in client.body)
    client.leave()
    bench.say(job, 2, "b", "c", "d")
    await task
    assert bench.log.finished.usage.completion_tokens <= 4
    assert b'"content":"b"' not in client.body or bench.log.finished.usage.completion_tokens == 4


async def test_a_client_that_leaves_as_its_worker_is_lost_is_not_served_again() -> None:
    """Both come in the same turn; nobody listens for this client's leaving a second time."""
    bench, client = Bench(), Client()
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    await turns()
    relay = bench.relay(job)
    client.leave()
    await asyncio.sleep(0)
    relay.fail(WorkerLost())
    await task
    assert len(bench.queue.jobs) == 1
    assert bench.log.finished.status == "cancelled"


async def test_a_client_that_leaves_while_its_worker_hands_back_has_left() -> None:
    """It leaves while the last text of the attempt is being written to it."""
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    await turns()
    client.writable.clear()
    bench.start(job)
    bench.say(job, 1, "a")
    bench.feed(job, Yielded(request_id=job.request_id, epoch=1, seq=2, reason="worker_draining"))
    await turns()
    client.leave(unstuck=False)
    await turns()
    client.writable.set()
    await task
    assert (bench.log.finished.status, bench.log.finished.code) == ("cancelled", "client_left")
    assert len(bench.queue.jobs) == 1


async def test_a_client_that_leaves_before_its_body_is_whole_is_recorded_and_told_nothing() -> None:
    bench, client = Bench(), Client(BODY[:20], whole=False)
    task = await bench.serve(client)
    await turns()
    client.leave()
    await task
    assert (bench.log.rejected.code, bench.log.rejected.http_status) == ("client_left", CLIENT_LEFT_STATUS)
    assert client.sent == []
    assert bench.queue.jobs == []


async def test_a_refusal_that_a_stopping_process_can_not_record_is_told_all_the_same() -> None:
    """The end of the drain cuts it off while it waits for the log: it was a bare 500 then."""
    bench, client = Bench(), Client(b"{}")
    bench.log.open.clear()
    task = await bench.serve(client)
    await eventually(lambda: bench.log.rejected)
    task.cancel()
    await task
    assert (client.status, _error_code(client)) == (400, "invalid_request")


async def test_a_body_that_is_not_here_yet_when_the_process_stops_is_refused_with_that() -> None:
    bench, client = Bench(), Client(BODY[:20], whole=False)
    task = await bench.serve(client)
    await turns()
    task.cancel()
    await task
    assert (client.status, _error_code(client)) == (503, "stopping")
    assert (bench.log.rejected.code, bench.log.rejected.http_status) == ("stopping", 503)


async def test_a_refused_body_is_not_read_on_when_the_process_stops() -> None:
    bench = Bench(settings=IngressSettings(max_body_bytes=30))
    client = Client(b"x" * 31, whole=False)
    task = await bench.serve(client)
    await eventually(lambda: client.status == 413)
    task.cancel()
    await task
    assert client.is_over


async def test_a_body_in_many_parts_is_one_body() -> None:
    bench, client = Bench(), Client(BODY[:1], whole=False)
    for at in range(1, len(BODY)):
        client.part(BODY[at : at + 1], more=at < len(BODY) - 1)
    task = await bench.serve(client)
    job = await bench.job()
    assert bytes(job.body) == BODY
    bench.start(job)
    bench.finish(job, 1, text="a")
    await task
    assert client.status == 200


async def test_a_refused_body_is_read_on_so_that_its_sender_reads_why() -> None:
    bench = Bench(settings=IngressSettings(max_body_bytes=30))
    client = Client(b"x" * 31, whole=False)
    task = await bench.serve(client)
    await eventually(lambda: client.status == 413)
    assert not client.is_over
    client.part(b"x" * 100, more=True)
    await turns()
    assert not task.done()
    client.part(b"", more=False)
    await task
    assert client.is_over


async def test_a_lost_worker_is_replaced_when_nothing_was_delivered() -> None:
    bench, client = Bench(routes=("r1", "r2")), Client()
    task = await bench.serve(client)
    first = await bench.job()
    bench.start(first)
    await turns()
    bench.switchboard.lose(WORKER)
    second = await bench.job(2)
    assert (first.route, second.route) == ("r1", "r2")
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.nonce != second.nonce
    bench.start(second, worker=OTHER)
    bench.finish(second, 1, text="a", worker=OTHER)
    await task
    assert client.status == 200
    assert (bench.log.finished.route, bench.log.finished.worker) == ("r2", OTHER)
    assert bench.log.finished.attempts == 2
    assert bench.log.kinds().count("attempt.lost") == 1


async def test_what_a_lost_attempt_said_is_not_counted_for_the_next() -> None:
    bench, client = Bench(), Client()
    task = await bench.serve(client)
    first = await bench.job()
    bench.start(first)
    bench.say(first, 1, "lost", "words")
    await turns()
    bench.switchboard.lose(WORKER)
    second = await bench.job(2)
    bench.start(second)
    bench.finish(second, 1, text="kept")
    await task
    assert b"kept" in client.body
    assert bench.log.finished.usage.completion_tokens == 1


async def test_after_so_many_lost_attempts_it_is_an_error() -> None:
    bench, client = Bench(), Client()
    task = await bench.serve(client)
    for number in range(1, LOST_MAX + 1):
        bench.start(await bench.job(number))
        await turns()
        bench.switchboard.lose(WORKER)
    await task
    assert (client.status, _error_code(client)) == (502, "worker_lost")
    assert bench.log.finished.attempts == LOST_MAX
    assert bench.log.finished.usage == Usage()
    assert len({job.nonce for job in bench.queue.jobs}) == LOST_MAX
    assert len(bench.switchboard) == 0


async def test_a_worker_lost_after_the_first_token_is_an_error_in_the_stream() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    await eventually(lambda: client.sent)
    bench.switchboard.lose(WORKER)
    await task
    assert (client.status, _error_code(client)) == (200, "worker_lost")
    assert b"[DONE]" not in client.body
    assert client.is_over
    assert len(bench.queue.jobs) == 1
    assert bench.log.finished.usage.completion_tokens == 1


async def test_a_worker_that_hands_back_in_peace_is_replaced_too() -> None:
    bench, client = Bench(), Client()
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.feed(job, Yielded(request_id=job.request_id, epoch=1, seq=1, reason="worker_draining"))
    second = await bench.job(2)
    bench.start(second)
    bench.finish(second, 1, text="a")
    await task
    assert client.status == 200
    assert bench.log.finished.attempts == 2


async def test_text_that_came_with_the_fault_is_delivered_before_it() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    bench.feed(job, Faulted(request_id=job.request_id, epoch=1, seq=2, code="upstream_error", message="broke"))
    await task
    assert client.body.index(b'"content":"a"') < client.body.index(b'"error"')
    assert _error_code(client) == "upstream_error"


async def test_a_second_worker_with_the_same_job_is_told_to_stop_and_changes_nothing() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    await bench.switchboard.start()
    (on_frame,) = bench.wall.listeners.values()
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    subject = subjects.frames(OTHER, INGRESS, job.nonce)
    strange = [
        Started(request_id=job.request_id, epoch=1, seq=0, worker=OTHER),
        Delta(request_id=job.request_id, epoch=1, seq=2, chunks=(msgspec.Raw(b'{"choices":["strange"]}'),)),
    ]
    for frame in strange:
        on_frame(Message(subject, codec.encode(frame)))
    bench.finish(job, 2)
    await task
    await turns()
    assert b"strange" not in client.body
    assert b"[DONE]" in client.body
    assert [(s, c.reason) for s, c in bench.wall.commands if isinstance(c, Cancel)] == [
        (subjects.ctl(OTHER), "not_wanted"),
        (subjects.ctl(OTHER), "not_wanted"),
    ]


async def test_after_a_reconnect_a_job_that_nobody_has_begun_is_published_again_as_the_same() -> None:
    """A queue that has not lost it tells by the id that it has it already."""
    bench, client = Bench(), Client()
    await bench.switchboard.start()
    task = await bench.serve(client)
    first = await bench.job()
    await turns()
    for callback in bench.wall.reconnected:
        await callback()
    again = await bench.job(2)
    assert msgspec.json.encode(again) == msgspec.json.encode(first)
    bench.start(first)
    for callback in bench.wall.reconnected:
        await callback()
    await turns()
    assert len(bench.queue.jobs) == 2
    bench.finish(first, 1, text="a")
    await task
    assert client.status == 200
    assert bench.log.finished.attempts == 1
    assert "attempt.lost" not in bench.log.kinds()


async def test_a_job_that_is_published_again_while_its_client_leaves_is_withdrawn_again() -> None:
    bench, client = Bench(), Client()
    await bench.switchboard.start()
    task = await bench.serve(client)
    await bench.job()
    await turns()
    bench.queue.open.clear()
    for callback in bench.wall.reconnected:
        await callback()
    client.leave()
    await task
    bench.queue.open.set()
    await turns()
    assert len(bench.queue.jobs) == 2
    assert set(bench.queue.withdrawn) == {1, 2}


async def test_a_slow_reader_is_cut_off_though_a_write_to_it_is_stuck() -> None:
    bench, client = Bench(max_bytes=100), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    await eventually(lambda: client.sent)
    client.writable.clear()
    relay = bench.relay(job)
    for seq in range(2, 10):
        delta = Delta(request_id=job.request_id, epoch=1, seq=seq, chunks=(msgspec.Raw(b'{"choices":[]}'),))
        relay.feed(delta, 60, worker=WORKER)
        await turns(3)
    await task
    await turns()
    assert client.cut
    assert _cancels(bench) == ["client_too_slow"]
    assert (bench.log.finished.status, bench.log.finished.code) == ("cancelled", "client_too_slow")
    assert len(bench.switchboard) == 0


@pytest.mark.parametrize(
    ("limit", "code"),
    [("queue_s", "queue_timeout"), ("first_token_s", "first_token_timeout"), ("total_s", "total_timeout")],
)
async def test_each_time_out_has_its_name_and_stops_the_work(limit: str, code: str) -> None:
    bench, client = Bench(timeouts=Timeouts(**{limit: 0.02})), Client()
    task = await bench.serve(client)
    job = await bench.job()
    if limit != "queue_s":
        bench.start(job)
    await task
    await turns()
    assert (client.status, _error_code(client)) == (504, code)
    assert bench.queue.withdrawn == ([1] if limit == "queue_s" else [])
    assert _cancels(bench) == ([] if limit == "queue_s" else [code])
    assert (bench.log.finished.code, bench.log.finished.usage) == (code, Usage())


async def test_silence_in_the_middle_is_an_idle_timeout() -> None:
    bench, client = Bench(timeouts=Timeouts(idle_s=0.02)), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    await task
    assert _error_code(client) == "idle_timeout"


async def test_comments_do_not_put_a_time_out_off() -> None:
    bench = Bench(timeouts=Timeouts(queue_s=0.1), keep_alive_comment_s=0.01)
    client = Client(STREAM_BODY)
    task = await bench.serve(client)
    await task
    assert client.body.count(b": keep-alive") >= 3
    assert _error_code(client) == "queue_timeout"


async def test_a_log_that_fails_is_a_503_and_the_work_is_stopped() -> None:
    bench, client = Bench(), Client()
    bench.log.broken = True
    task = await bench.serve(client)
    await task
    await turns()
    assert (client.status, _error_code(client)) == (503, "log_unavailable")
    assert bench.queue.withdrawn == [1]


@pytest.mark.parametrize(
    ("error", "status", "kind"), [(BacklogFull(), 429, "rejected"), (QueueUnavailable(), 503, "failed")]
)
async def test_a_queue_that_takes_no_job_is_told_with_when_to_retry(
    error: BacklogFull | QueueUnavailable, status: int, kind: str
) -> None:
    bench, client = Bench(), Client()
    bench.queue.error = error
    await (await bench.serve(client))
    assert client.status == status
    assert (b"retry-after", b"1") in client.sent[0]["headers"]
    assert (bench.log.finished.status, bench.log.finished.code, bench.log.finished.cost_pico) == (kind, error.code, 0)


@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
async def test_a_process_that_waits_no_longer_tells_its_clients_and_stops_the_work(body: bytes) -> None:
    bench, client = Bench(), Client(body)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    await turns()
    task.cancel()
    await task
    await turns()
    assert (client.status, _error_code(client)) == (503, "stopping")
    assert _cancels(bench) == ["ingress_stopping"]
    assert bench.log.finished.code == "stopping"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a log that is away."""
    monkeypatch.setattr(books, "RECORD_WAIT_S", 0.05)
    monkeypatch.setattr(books, "LAST_WORD_WAIT_S", 0.05)


@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.usefixtures("hasty")
async def test_a_success_that_can_not_be_recorded_is_taken_back_and_told_as_what_is_recorded_instead(
    *, stops: bool, body: bytes
) -> None:
    bench, client = Bench(), Client(body)
    task = await bench.serve_until_recorded(client)
    if stops:
        task.cancel()
    await task
    code = "stopping" if stops else "log_unavailable"
    assert (client.status, _error_code(client)) == (503, code)
    assert (bench.log.finished.status, bench.log.finished.code) == ("failed", code)
    assert bench.log.finished.usage.total_tokens == 0  # nothing of it was delivered


@pytest.mark.usefixtures("hasty")
async def test_what_was_delivered_of_a_success_that_is_taken_back_is_billed() -> None:
    bench, client = Bench(), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a", "b")
    await eventually(lambda: b'"content":"b"' in client.body)
    bench.log.open.clear()
    bench.finish(job, 2, text="c")
    await task
    assert b'"content":"c"' not in client.body
    assert b"log_unavailable" in client.body
    assert (bench.log.finished.status, bench.log.finished.http_status) == ("failed", 200)
    assert bench.log.finished.usage.completion_tokens == 2


@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.usefixtures("hasty")
async def test_of_a_success_that_may_still_be_recorded_no_end_is_told(*, stops: bool, body: bytes) -> None:
    bench, client = Bench(), Client(body)
    task = await bench.serve_until_recorded(client)
    bench.log.sent = True
    if stops:
        task.cancel()
    await task
    assert client.cut
    assert client.sent == []
    assert bench.log.finished.status == "completed"


@pytest.mark.usefixtures("hasty")
async def test_whoever_comes_back_for_an_answer_whose_end_nobody_knows_is_not_told_one() -> None:
    bench, client, later = Bench(), Client(STREAM_BODY), Client(STREAM_BODY)
    task = await bench.serve_until_recorded(client, headers={"Idempotency-Key": "k"})
    bench.log.sent = True
    await asyncio.gather(*bench.tasks, task)
    assert client.cut
    assert client.sent == []
    await (await bench.serve(later, headers={"Idempotency-Key": "k"}))
    assert (later.status, _error_code(later)) == (410, "answer_not_kept")


@pytest.mark.parametrize("body", [BODY, STREAM_BODY])
async def test_what_is_on_record_after_all_is_what_a_process_that_stops_tells(body: bytes) -> None:
    bench, client = Bench(), Client(body)
    task = await bench.serve_until_recorded(client)
    task.cancel()
    await turns()
    bench.log.open.set()
    await task
    assert bench.log.finished.status == "completed"
    assert client.status == 200
    assert b"stopping" not in b"".join(message.get("body", b"") for message in client.sent)


class OnRecord(Receipts):
    """The worker had put *usage* on record before it was lost, or nothing."""

    def __init__(self, usage: Usage | None) -> None:
        self._usage = usage

    async def usage(self, job: Job, worker: WorkerId) -> Usage | None:
        assert (job.epoch, worker) == (1, WORKER)
        return self._usage


@pytest.mark.parametrize("put", [None, Usage(prompt_tokens=7, completion_tokens=1)])
async def test_a_worker_lost_behind_the_last_word_is_billed_by_its_receipt_if_there_is_one(put: Usage | None) -> None:
    bench, client = Bench(receipts=OnRecord(put)), Client(STREAM_BODY)
    task = await bench.serve(client)
    job = await bench.job()
    bench.start(job)
    bench.say(job, 1, "a")
    end = Raw(b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}')
    bench.feed(job, Delta(request_id=job.request_id, epoch=job.epoch, seq=2, chunks=(end,)))
    await turns()
    bench.switchboard.lose(WORKER)
    await task
    finished = bench.log.finished
    assert (finished.status, finished.finish_reason, finished.usage.completion_tokens) == ("completed", "stop", 1)
    assert finished.estimated is (put is None)
    assert put is None or finished.usage == put
    assert b"[DONE]" in client.body


async def test_a_defect_of_ours_costs_one_request_and_is_told_in_the_same_shape() -> None:
    bench, client = Bench(), Client()
    bench.queue.error = ZeroDivisionError()  # type: ignore[assignment]  # whatever nobody has foreseen
    await (await bench.serve(client))
    assert (client.status, _error_code(client)) == (500, "internal_error")
    assert bench.log.finished.status == "failed"
    assert len(bench.switchboard) == 0
