"""What is kept of answers: within its bounds, for its time, and apart for each sort."""

from __future__ import annotations

import tracemalloc

import pytest

from ingress.archive import Archive, Claim, fingerprint
from ingress.transcript import EVENT, Owner, Transcript
from schemas.errors import AnswerNotFound, AnswerNotKept, BadRequest, IdempotencyKeyReused
from schemas.ids import KeyId, OrgId, RequestId
from schemas.settings import IngressSettings

OWNER = Owner(OrgId("default"), KeyId("key_1"))
OTHER = Owner(OrgId("default"), KeyId("key_2"))
KIB = 1024


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def archive(*, clock: Clock | None = None, **settings: float) -> Archive:
    return Archive(IngressSettings(**settings), clock=clock or Clock())  # type: ignore[arg-type]  # some are ints


def request(number: int) -> RequestId:
    return RequestId(f"request-{number}")


def begin(transcript: Transcript) -> None:
    transcript.take(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    )


def say(transcript: Transcript, *numbers: int, size: int = 100, more: bool = True) -> bytes:
    body = b"".join(b"id: %d\ndata: %b\n\n" % (number, b"x" * size) for number in numbers)
    transcript.take({"type": "http.response.body", "body": body, "more_body": more, EVENT: numbers[-1]})
    return body


def tell(transcript: Transcript, *, events: int = 3, size: int = 100) -> None:
    """A whole stream."""
    begin(transcript)
    for number in range(1, events + 1):
        say(transcript, number, size=size, more=number < events)


def claim(kept: Archive, number: int, *, body: bytes = b"{}", owner: Owner = OWNER) -> Transcript:
    return kept.claim(request(number), Claim(owner, f"key-{number}"), body=body, grace_s=60)


async def test_a_key_finds_its_transcript_while_it_runs_and_after_it_was_served() -> None:
    kept = archive()
    assert kept.find_claim(Claim(OWNER, "key-1"), body=b"{}") is None
    transcript = claim(kept, 1)
    assert kept.find_claim(Claim(OWNER, "key-1"), body=b"{}") is transcript
    assert kept.find_claim(Claim(OTHER, "key-1"), body=b"{}") is None
    tell(transcript)
    kept.settle(transcript)
    assert kept.find_claim(Claim(OWNER, "key-1"), body=b"{}") is transcript
    assert kept.find(OWNER, request(1)) is transcript


async def test_another_body_under_the_same_key_is_refused_and_a_claim_can_not_be_made_twice() -> None:
    kept = archive()
    claim(kept, 1, body=b'{"a":1}')
    with pytest.raises(IdempotencyKeyReused):
        kept.find_claim(Claim(OWNER, "key-1"), body=b'{"a":2}')
    with pytest.raises(AssertionError):
        claim(kept, 1, body=b'{"a":1}')


@pytest.mark.parametrize("other", [b'{ "b" : [1, 2],"a":1 }', b'{"a":1,"b":[1,2]}', b'{"b":[1,2],"\\u0061":1}'])
def test_how_json_is_written_makes_no_other_body(other: bytes) -> None:
    assert fingerprint(other) == fingerprint(b'{"a":1,"b":[1,2]}')


@pytest.mark.parametrize(
    "other", [b'{"a":1,"b":[2,1]}', b'{"a":1,"b":[1,2],"c":null}', b'{"a":1.5}', b'{"a":1e999}', b"[" * 5000]
)
def test_what_json_says_does(other: bytes) -> None:
    assert fingerprint(other) != fingerprint(b'{"a":1,"b":[1,2]}')


async def test_what_was_not_served_frees_its_key_and_can_still_be_read_on() -> None:
    kept = archive()
    transcript = claim(kept, 1)
    tell(transcript)
    kept.settle(transcript, served=False)
    assert kept.find_claim(Claim(OWNER, "key-1"), body=b"other") is None
    assert kept.find(OWNER, request(1)) is transcript
    assert claim(kept, 1, body=b"again") is not transcript


async def test_each_sort_has_its_time() -> None:
    clock = Clock()
    kept = archive(clock=clock, resume_s=60, idempotency_s=3600)
    asked, keyed = kept.open(request(1), OWNER, grace_s=60), claim(kept, 2)
    unasked = kept.open_unasked(request(3), OWNER)
    assert unasked is not None
    for transcript in (asked, keyed, unasked):
        tell(transcript)
        kept.settle(transcript)
    clock.now = 59
    assert [kept.find(OWNER, request(n)) for n in (1, 2, 3)] == [asked, keyed, unasked]
    clock.now = 61
    for number in (1, 3):
        with pytest.raises(AnswerNotFound):
            kept.find(OWNER, request(number))
    assert kept.find(OWNER, request(2)) is keyed
    clock.now = 3601
    assert kept.find_claim(Claim(OWNER, "key-2"), body=b"{}") is None
    assert (len(kept), kept.kept_bytes) == (0, 0)


async def test_one_that_runs_does_not_expire() -> None:
    clock = Clock()
    kept = archive(clock=clock)
    transcript = claim(kept, 1)
    clock.now = 1e6
    assert kept.find_claim(Claim(OWNER, "key-1"), body=b"{}") is transcript


async def test_the_oldest_lose_what_they_hold_and_a_retry_is_told_so() -> None:
    kept = archive(max_kept_bytes=200 * KIB)
    for number in range(20):
        transcript = claim(kept, number)
        tell(transcript, size=5 * KIB)
        kept.settle(transcript)
    assert kept.kept_bytes <= 100 * KIB
    old = kept.find_claim(Claim(OWNER, "key-0"), body=b"{}")
    assert old is not None
    with pytest.raises(AnswerNotKept):
        old.check(0)
    new = kept.find_claim(Claim(OWNER, "key-19"), body=b"{}")
    assert new is not None
    new.check(0)


async def test_streams_that_nobody_asked_to_keep_take_nothing_from_those_that_somebody_did() -> None:
    kept = archive(max_kept_bytes=200 * KIB)
    transcript = claim(kept, 0)
    tell(transcript, size=5 * KIB)
    kept.settle(transcript)
    for number in range(1, 50):
        unasked = kept.open_unasked(request(number), OWNER)
        assert unasked is not None
        tell(unasked, size=5 * KIB)
        kept.settle(unasked)
    transcript.check(0)
    assert transcript.read(0)[1] == 3
    assert kept.kept_bytes <= (50 + 20) * KIB


async def test_there_are_no_more_than_may_be() -> None:
    kept = archive(max_kept_answers=10)
    for number in range(100):
        transcript = claim(kept, number)
        tell(transcript)
        kept.settle(transcript)
    assert len(kept) == 10
    assert kept.find_claim(Claim(OWNER, "key-89"), body=b"{}") is None
    assert kept.find_claim(Claim(OWNER, "key-90"), body=b"{}") is not None


async def test_those_that_run_are_within_the_bound_too() -> None:
    """They forget their own beginnings: nothing else is left to be dropped."""
    kept = archive(max_kept_bytes=400 * KIB)
    running = [claim(kept, number) for number in range(20)]
    for transcript in running:
        begin(transcript)
    for event in range(1, 101):
        for transcript in running:
            say(transcript, event, size=KIB)
    assert kept.kept_bytes <= 200 * KIB + 20 * 2 * KIB  # each keeps its newest event
    assert all(transcript.read(transcript.first - 1)[1] == 100 for transcript in running)


async def test_ten_thousand_transcripts_take_what_they_are_counted_to_take() -> None:
    """Also those that nobody asked for, which no client can hold back."""
    kept = archive(max_kept_bytes=16 * KIB * KIB)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(10_000):
            transcript = claim(kept, number) if number % 2 else kept.open_unasked(request(number), OWNER)
            assert transcript is not None
            tell(transcript, events=20, size=300)
            kept.settle(transcript)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept.kept_bytes <= 12 * KIB * KIB
    assert taken < 1.3 * kept.kept_bytes


async def test_the_bytes_that_are_counted_are_those_that_are_kept() -> None:
    clock = Clock()
    kept = archive(clock=clock, max_kept_answer_bytes=4 * KIB)
    for number in range(30):
        transcript = claim(kept, number) if number % 3 else kept.open(request(number), OWNER, grace_s=1)
        tell(transcript, events=number + 1, size=200)
        kept.settle(transcript, served=number % 4 > 0)
    assert kept.kept_bytes > 0
    clock.now = 1e6
    with pytest.raises(AnswerNotFound):
        kept.find(OWNER, request(1))
    assert (kept.kept_bytes, len(kept)) == (0, 0)


async def test_one_that_was_cancelled_says_so_to_who_reads_it() -> None:
    kept = archive()
    silent, begun = claim(kept, 1), claim(kept, 2)
    begin(begun)
    said = say(begun, 1)
    for transcript in (silent, begun):
        kept.settle(transcript)
        assert transcript.ended
    assert silent.status == 410
    assert b"request_cancelled" in silent.read(0)[0]
    assert begun.status == 200
    body, last = begun.read(0)
    assert body.startswith(said + b'id: 2\ndata: {"error"')
    assert last == 2


async def test_an_event_that_is_not_there_can_not_be_read_after() -> None:
    kept = archive()
    transcript = claim(kept, 1)
    with pytest.raises(BadRequest):
        transcript.check(1)
    tell(transcript)
    transcript.check(3)
    with pytest.raises(BadRequest):
        transcript.check(4)
