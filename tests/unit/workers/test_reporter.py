"""The frames of an attempt: their numbers, what shares a frame, what is kept, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from bus.connection import BusUnavailable
from schemas import codec, subjects
from schemas.errors import ProviderNonsense, ProviderRateLimited
from schemas.frames import AnyFrame, Delta, Faulted, Finished, Started, Yielded
from schemas.ids import WorkerId
from schemas.jobs import Cancelled, Completed, Failed, HandedBack
from schemas.money import Usage
from tests.factories import new_job
from workers.providers.base import Chunk
from workers.reporter import (
    CHUNKS_PER_FRAME_MAX,
    ENVELOPE_MAX_BYTES,
    FRAME_CHUNKS_BYTES_MAX,
    KEPT_FOR_S,
    KEPT_REPORTS_MAX,
    KEPT_REPORTS_MAX_BYTES,
    USAGE_MAX_BYTES,
    KeptReports,
    Outbox,
    Reporter,
)

WORKER = WorkerId("worker-1")
MAX_PAYLOAD = 4 * 1024 * 1024
DONE = Completed(usage=Usage(prompt_tokens=1, completion_tokens=2), finish_reason="stop")


class Wire:
    """As much of a connection as an outbox needs; keeps what was said."""

    max_payload = MAX_PAYLOAD

    def __init__(self) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.refuses = False
        self.breaks = False
        self.is_quiet = False

    def say_at_once(self, messages: list[tuple[str, bytes]]) -> bool:
        if self.breaks:
            raise RuntimeError
        if not self.refuses:
            self.said += messages
        return not self.refuses

    async def say(self, subject: str, payload: bytes) -> None:
        if self.refuses:
            raise BusUnavailable
        self.said.append((subject, payload))

    def frames(self) -> list[AnyFrame]:
        return [codec.decode_frame(payload) for _, payload in self.said]


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def outbox(wire: Wire) -> AsyncIterator[Outbox]:
    made = Outbox(wire)  # type: ignore[arg-type]
    made.start()
    yield made
    await made.stop()


@pytest.fixture
async def report(outbox: Outbox) -> Reporter:
    return _reporter(outbox)


async def test_numbers_have_no_gaps_from_started_to_the_last_frame(wire: Wire, report: Reporter) -> None:
    report.started()
    for number in range(10):
        report.chunk(_chunk(number))
        await _turns()
    report.ended(DONE)
    await _turns()
    frames = wire.frames()
    assert [frame.seq for frame in frames] == list(range(12))
    assert isinstance(frames[0], Started)
    assert isinstance(frames[-1], Finished)
    assert {(frame.request_id, frame.epoch) for frame in frames} == {(report._job.request_id, 1)}
    assert {subject for subject, _ in wire.said} == {
        subjects.frames(WORKER, report._job.ingress, report._job.nonce),
    }


async def test_a_chunk_alone_is_a_frame_and_goes_out_in_the_next_turn(wire: Wire, report: Reporter) -> None:
    for number in range(5):
        report.chunk(_chunk(number))
        assert len(wire.said) == number
        await _turns()
        assert len(wire.said) == number + 1
    assert [len(frame.chunks) for frame in wire.frames() if isinstance(frame, Delta)] == [1] * 5


async def test_the_first_token_goes_out_in_its_own_turn_when_nobody_else_speaks(wire: Wire, report: Reporter) -> None:
    report.started()
    await _turns()
    wire.is_quiet = True
    report.chunk(Chunk(members=b'{"choices":[{"index":0,"delta":{"role":"assistant"}}]}'))
    assert [type(frame) for frame in wire.frames()] == [Started]
    report.chunk(_chunk(1))
    assert [type(frame) for frame in wire.frames()] == [Started, Delta]
    report.chunk(_chunk(2))
    assert len(wire.said) == 2  # only the first one
    await _turns()
    assert [frame.seq for frame in wire.frames()] == [0, 1, 2]


@pytest.mark.parametrize("busy", ["others speak", "a frame waits", "it is all there is"])
async def test_a_first_token_waits_for_its_turn_otherwise(busy: str, wire: Wire, report: Reporter) -> None:
    wire.is_quiet = busy != "others speak"
    if busy == "a frame waits":
        report.started()
    report.chunk(_chunk(1) if busy != "it is all there is" else replace(_chunk(1), finish_reason="stop"))
    assert wire.said == []
    await _turns()
    seqs = [frame.seq for frame in wire.frames()]
    assert seqs == list(range(len(seqs)))


async def test_a_first_token_that_can_not_be_said_at_once_is_said_in_its_turn(wire: Wire, report: Reporter) -> None:
    wire.is_quiet = wire.breaks = True
    report.chunk(_chunk(1))
    assert wire.said == []
    await _turns()
    assert [frame.seq for frame in wire.frames()] == [0]


async def test_a_first_chunk_without_a_token_goes_along_with_the_next(wire: Wire, report: Reporter) -> None:
    report.chunk(Chunk(members=b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'))
    await _turns()
    assert wire.said == []
    report.chunk(_chunk(1))
    await _turns()
    report.chunk(Chunk(members=b'{"choices":[{"index":0,"delta":{"content":""}}]}'))
    await _turns()
    assert [len(frame.chunks) for frame in wire.frames() if isinstance(frame, Delta)] == [2, 1]


@pytest.mark.parametrize("outcome", [DONE, Failed(fault=ProviderNonsense())], ids=["done", "failed"])
async def test_a_chunk_without_a_token_that_none_follows_goes_out_with_the_end(
    outcome: Completed | Failed, wire: Wire, report: Reporter
) -> None:
    report.chunk(Chunk(members=b'{"choices":[{"index":0,"delta":{"role":"assistant"}}]}'))
    await _turns()
    report.ended(outcome)
    await _turns()
    assert sum(len(frame.chunks) for frame in wire.frames() if isinstance(frame, Delta | Finished)) == 1


async def test_chunks_of_one_turn_share_a_frame(wire: Wire, report: Reporter) -> None:
    for number in range(40):
        report.chunk(_chunk(number))
    await _turns()
    (frame,) = wire.frames()
    assert isinstance(frame, Delta)
    assert [bytes(chunk) for chunk in frame.chunks] == [_members(number) for number in range(40)]
    assert frame.tokens == 40


async def test_attempts_of_one_turn_do_not_mix(wire: Wire, outbox: Outbox) -> None:
    reports = [_reporter(outbox) for _ in range(3)]
    for number in range(30):
        reports[number % 3].chunk(_chunk(number))
    await _turns()
    assert len(wire.said) == 3
    for report in reports:
        (frame,) = [f for f in wire.frames() if f.request_id == report._job.request_id]
        assert isinstance(frame, Delta)
        assert len(frame.chunks) == 10


async def test_the_order_of_chunks_is_kept_over_frames(wire: Wire, report: Reporter) -> None:
    count = 2 * CHUNKS_PER_FRAME_MAX + 10
    for number in range(count):
        report.chunk(_chunk(number))
        if number % 97 == 0:
            await _turns()
    report.ended(DONE)
    await _turns()
    assert _chunks(wire.frames()) == [_members(number) for number in range(count)]
    assert sum(frame.tokens for frame in wire.frames() if isinstance(frame, Delta | Finished)) == count
    assert report.tokens == count


@pytest.mark.parametrize("ended", [False, True])
async def test_a_frame_has_at_most_so_many_chunks(ended: bool, wire: Wire, report: Reporter) -> None:
    for number in range(2 * CHUNKS_PER_FRAME_MAX + 1):
        report.chunk(_chunk(number))
    if ended:
        report.ended(DONE)
    await _turns()
    frames = wire.frames()
    assert [len(frame.chunks) for frame in frames if isinstance(frame, Delta | Finished)] == [
        CHUNKS_PER_FRAME_MAX,
        CHUNKS_PER_FRAME_MAX,
        1,
    ]
    assert isinstance(frames[-1], Finished if ended else Delta)


async def test_a_frame_has_at_most_so_many_bytes_of_chunks(wire: Wire, report: Reporter) -> None:
    """Ten images of a megabyte in one turn would be a frame that NATS doesn't take, and that never arrives."""
    for size in [FRAME_CHUNKS_BYTES_MAX // 2] * 4 + [FRAME_CHUNKS_BYTES_MAX + 1] * 2 + [10] * 3:
        report.chunk(Chunk(members=_members_of(size)))
    report.ended(DONE)
    await _turns()
    frames = [frame for frame in wire.frames() if isinstance(frame, Delta | Finished)]
    assert [len(frame.chunks) for frame in frames] == [2, 2, 1, 1, 3]
    assert all(len(payload) <= MAX_PAYLOAD for _, payload in wire.said)


async def test_the_largest_chunk_that_is_taken_fits_into_a_message(wire: Wire, report: Reporter) -> None:
    report.chunk(
        Chunk(
            members=_members_of(MAX_PAYLOAD - ENVELOPE_MAX_BYTES), usage_raw=b'"' + b"u" * (USAGE_MAX_BYTES - 2) + b'"'
        )
    )
    report.ended(DONE)
    await _turns()
    assert [len(payload) <= MAX_PAYLOAD for _, payload in wire.said] == [True]


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(members=b"[" + b"1" * (MAX_PAYLOAD - ENVELOPE_MAX_BYTES) + b"]"),
        Chunk(members=None, usage_raw=b'"' + b"u" * USAGE_MAX_BYTES + b'"'),
    ],
)
async def test_a_chunk_that_no_message_can_carry_is_the_providers_fault(chunk: Chunk, report: Reporter) -> None:
    with pytest.raises(ProviderNonsense):
        report.chunk(chunk)


async def test_finished_carries_the_last_chunks_and_the_usage(wire: Wire, report: Reporter) -> None:
    report.chunk(_chunk(0))
    await _turns()
    report.chunk(_chunk(1), wait_us=7)
    report.chunk(Chunk(members=None, usage_raw=b'{"prompt_tokens": 1, "x": 2}'))
    report.ended(DONE)
    await _turns()
    last = wire.frames()[-1]
    assert isinstance(last, Finished)
    assert [bytes(chunk) for chunk in last.chunks] == [_members(1)]
    assert (last.seq, last.tokens, last.wait_us) == (1, 1, 7)
    assert (last.usage, last.finish_reason) == (DONE.usage, "stop")
    assert bytes(last.usage_raw) == b'{"prompt_tokens": 1, "x": 2}'


async def test_usage_alone_makes_no_frame(wire: Wire, report: Reporter) -> None:
    report.chunk(Chunk(members=None, usage_raw=b"{}"))
    await _turns()
    assert wire.said == []


async def test_a_fault_comes_behind_the_chunks_before_it(wire: Wire, report: Reporter) -> None:
    report.chunk(_chunk(0))
    report.chunk(_chunk(1))
    fault = ProviderRateLimited("Later.", status=429, type_="t", param="p", upstream_code="c", retry_after_s=1.5)
    report.ended(Failed(fault=fault))
    await _turns()
    delta, last = wire.frames()
    assert isinstance(delta, Delta)
    assert len(delta.chunks) == 2
    assert isinstance(last, Faulted)
    assert (last.seq, last.code, last.message, last.status) == (1, "upstream_rate_limited", "Later.", 429)
    assert (last.type, last.param, last.upstream_code, last.retry_after_s) == ("t", "p", "c", 1.5)


async def test_a_hand_back_comes_behind_the_chunks_before_it(wire: Wire, report: Reporter) -> None:
    report.chunk(_chunk(0))
    report.ended(HandedBack(reason="worker_draining"))
    await _turns()
    delta, last = wire.frames()
    assert isinstance(delta, Delta)
    assert isinstance(last, Yielded)
    assert (last.seq, last.reason) == (1, "worker_draining")


async def test_a_cancelled_attempt_has_no_last_frame(wire: Wire, report: Reporter) -> None:
    report.started()
    report.ended(Cancelled(reason="client_left"))
    await _turns()
    assert [type(frame) for frame in wire.frames()] == [Started]


async def test_frames_are_sent_again_from_a_number_on_byte_for_byte(wire: Wire, report: Reporter) -> None:
    report.started()
    for number in range(5):
        report.chunk(_chunk(number))
        await _turns()
    report.ended(DONE)
    await _turns()
    first = list(wire.said)
    for seq in (0, 3, 6, 7):
        wire.said.clear()
        report.resend(seq)
        await _turns()
        assert wire.said == first[seq:]
    wire.said.clear()
    report.repeat_last()
    await _turns()
    assert wire.said == first[-1:]


async def test_what_could_not_be_sent_can_be_asked_for_again(wire: Wire, report: Reporter) -> None:
    report.started()
    await _turns()
    wire.refuses = True
    report.chunk(_chunk(0))
    await _turns()
    wire.refuses = False
    report.chunk(_chunk(1))
    await _turns()
    assert [frame.seq for frame in wire.frames()] == [0, 2]
    report.resend(1)
    await _turns()
    assert [frame.seq for frame in wire.frames()] == [0, 2, 1, 2]


async def test_the_oldest_frames_are_forgotten_over_the_bound(wire: Wire, outbox: Outbox) -> None:
    report = _reporter(outbox, max_kept_bytes=10_000)
    for _ in range(20):
        report.chunk(Chunk(members=_members_of(2000), tokens=1))
        await _turns()
    assert report.size <= 10_000
    wire.said.clear()
    report.resend(0)
    await _turns()
    assert [frame.seq for frame in wire.frames()] == [16, 17, 18, 19]


async def test_one_frame_over_the_bound_is_sent_and_not_kept(wire: Wire, outbox: Outbox) -> None:
    report = _reporter(outbox, max_kept_bytes=100)
    report.chunk(Chunk(members=_members_of(2000), tokens=1))
    await _turns()
    assert len(wire.said) == 1
    assert report.size == 0
    report.repeat_last()
    await _turns()
    assert len(wire.said) == 1


async def test_a_report_that_can_not_be_written_costs_its_attempt_alone(wire: Wire, outbox: Outbox) -> None:
    broken, sound = _reporter(outbox), _reporter(outbox)
    broken.ended(Completed(usage=None, finish_reason="\ud800"))  # half a character: no bytes of it exist
    sound.chunk(_chunk(0))
    await _turns()
    sound.ended(DONE)
    await _turns()
    told = {type(frame) for frame in wire.frames() if frame.request_id == sound._job.request_id}
    assert told == {Delta, Finished}
    (last,) = [frame for frame in wire.frames() if frame.request_id == broken._job.request_id]
    assert isinstance(last, Faulted)
    assert (last.seq, last.code) == (0, "upstream_invalid_response")


async def test_stopping_sends_everything_first(wire: Wire) -> None:
    outbox = Outbox(wire)  # type: ignore[arg-type]
    outbox.start()
    reports = [_reporter(outbox) for _ in range(10)]
    for report in reports:
        report.started()
        report.chunk(_chunk(0))
        report.ended(DONE)
    await outbox.stop()
    assert len(wire.said) == 20
    reports[0].resend(0)  # somebody asks too late
    await outbox.stop()
    assert len(wire.said) == 20


async def test_a_word_put_behind_a_frame_goes_out_behind_it(wire: Wire, outbox: Outbox) -> None:
    report = _reporter(outbox)
    report.started()
    outbox.put("ack", b"")
    report.chunk(_chunk(0))
    await _turns()
    assert [subject for subject, _ in wire.said] == [report._subject, "ack", report._subject]


class Clock:
    """As much of an event loop as kept reports need."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


async def test_ended_attempts_are_kept_for_a_while(outbox: Outbox) -> None:
    clock: Any = Clock()
    kept = KeptReports(clock)
    early, late = _reporter(outbox), _reporter(outbox)
    kept.add(early)
    clock.now = KEPT_FOR_S - 0.1
    kept.add(late)
    assert kept.get(early.nonce) is early
    clock.now = KEPT_FOR_S + 0.1
    kept.add(_reporter(outbox))
    assert kept.get(early.nonce) is None
    assert kept.get(late.nonce) is late
    assert next(iter(kept)) is late


async def test_no_more_than_so_many_attempts_are_kept(outbox: Outbox) -> None:
    clock: Any = Clock()
    kept = KeptReports(clock)
    reports = [_reporter(outbox) for _ in range(KEPT_REPORTS_MAX + 5)]
    for report in reports:
        kept.add(report)
    assert list(kept) == reports[5:]


async def test_no_more_than_so_many_bytes_are_kept(outbox: Outbox) -> None:
    """Also of chunks that are on their way at the moment: an answer without streaming is all in its last frame."""
    clock: Any = Clock()
    kept = KeptReports(clock)
    large = KEPT_REPORTS_MAX_BYTES // 20
    reports = [_reporter(outbox) for _ in range(30)]
    for report in reports:
        report.chunk(Chunk(members=_members_of(large)))
        kept.add(report)
    assert list(kept) == reports[-20:]


def _reporter(outbox: Outbox, *, max_kept_bytes: int = 8 * 1024 * 1024) -> Reporter:
    return Reporter(new_job(), outbox, worker=WORKER, max_kept_bytes=max_kept_bytes)


def _members(number: int) -> bytes:
    return b'{"choices":[{"index":0,"delta":{"content":"%d"}}]}' % number


def _members_of(size: int) -> bytes:
    return b'"' + b"x" * (size - 2) + b'"'


def _chunk(number: int) -> Chunk:
    return Chunk(members=_members(number), tokens=1)


def _chunks(frames: list[AnyFrame]) -> list[bytes]:
    return [bytes(chunk) for frame in frames if isinstance(frame, Delta | Finished) for chunk in frame.chunks]


async def _turns() -> None:
    """The turns of the event loop in which an outbox wakes and sends."""
    for _ in range(3):
        await asyncio.sleep(0)
