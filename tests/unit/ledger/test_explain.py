"""The story of a request."""

from __future__ import annotations

from ledger.explain import as_json, clock, tell, words
from schemas.events import LeftOutLeg
from schemas.ids import RequestId, RouteId
from schemas.money import UNKNOWN, Price, Usage
from schemas.upcasters import UnknownEvent
from tests.unit.ledger import samples

ID = RequestId(samples.uuid(1))


def test_a_request_that_went_well_is_told_in_order() -> None:
    life = tell(ID, samples.whole())
    assert life.summary == "completed, HTTP 200, 20 prompt + 10 completion tokens (4 cached), $0.000008700000"
    assert [moment.kind for moment in life.moments] == [
        "request.accepted",
        "attempt.started",
        "attempt.finished",
        "request.finished",
    ]
    assert [moment.offset_ms for moment in life.moments] == [0, 2, 42, 45]
    assert "plan r1 → r2; $0.15 in, $0.6 out per million tokens" in life.moments[0].text
    assert "after 2.0 ms in the queue" in life.moments[1].text
    assert "reported 20 prompt + 10 completion tokens (4 cached); first token after 5.0 ms" in life.moments[2].text
    assert "1 attempt; first token after 7.5 ms; took 45.0 ms; finish reason stop" in life.moments[3].text


def test_a_plan_is_told_with_its_reasons_and_what_was_left_out() -> None:
    event = samples.accepted(
        models=("m", "n"),
        reasons=("own, free", ""),
        left_out=(
            LeftOutLeg(route=RouteId("r3"), model="m", why="over provider.max_price"),
            LeftOutLeg(route=RouteId("r4"), model="n", why="in provider.ignore"),
            LeftOutLeg(route=RouteId(""), model="x", why="no such model here"),
        ),
    )
    (moment,) = tell(ID, [event]).moments
    assert "plan r1 (own, free) → r2 as n; " in moment.text
    assert moment.text.endswith(
        "; left out: r3 (over provider.max_price), r4 as n (in provider.ignore), all routes as x (no such model here)"
    )


def test_a_rejection_tells_the_places_that_were_not_allowed() -> None:
    left_out = (LeftOutLeg(route=RouteId("r1"), model="m", why="price unknown"),)
    (moment,) = tell(ID, [samples.rejected(code="no_allowed_route", http_status=404, left_out=left_out)]).moments
    assert moment.text.endswith("left out: r1 (price unknown)")


def test_a_cause_comes_before_its_effect_whatever_the_clocks_say() -> None:
    """A worker's clock may run behind the ingress's."""
    events = [samples.accepted(), samples.started(), samples.receipt(ts_ns=samples.NOON_NS - 5), samples.finished()]
    kinds = [moment.kind for moment in tell(ID, events).moments]
    assert kinds == ["request.accepted", "attempt.started", "attempt.finished", "request.finished"]


def test_what_no_other_caused_is_told_by_its_time() -> None:
    """The receipt is the worker's word: it may be written behind the ingress's last one, and is told behind it then."""
    late = samples.receipt(ts_ns=samples.finished().ts_ns + 1_000_000)
    life = tell(ID, [samples.accepted(), samples.started(), late, samples.finished()])
    assert [moment.kind for moment in life.moments][2:] == ["request.finished", "attempt.finished"]
    offsets = [moment.offset_ms for moment in life.moments]
    assert offsets == sorted(offsets)


def test_each_attempt_is_told_on_its_own() -> None:
    events = [
        samples.accepted(),
        samples.started(epoch=1),
        samples.started(epoch=2, worker="worker-2", ts_ns=samples.lost().ts_ns + 1),
        samples.receipt(epoch=2, worker="worker-2"),
        samples.lost(epoch=1),
        samples.finished(attempts=2, migrations=1),
    ]
    texts = [moment.text for moment in tell(ID, events).moments]
    assert texts[1].startswith("attempt 1 started")
    assert texts[2] == "attempt 1 given up: worker_lost (worker-1 on r1)"
    assert texts[3].startswith("attempt 2 started at worker-2")
    assert "2 attempts; moved once" in texts[5]


def test_an_answer_that_went_on_elsewhere_says_from_where_to_where() -> None:
    events = [
        samples.finished(attempts=2, migrations=1),
        samples.migrated(),
        samples.lost(epoch=1),
        samples.started(epoch=2),
    ]
    texts = [moment.text for moment in tell(ID, events).moments]
    assert texts[2] == (
        "went on as attempt 2 at worker-2 on r2, exact, behind 7 tokens of worker-1 on r1 (worker_lost); "
        "85.0 ms without a token"
    )
    assert "moved once" in texts[3]


def test_a_rejected_request_has_its_reason() -> None:
    life = tell(ID, [samples.rejected(key_id=None, model=None, code="invalid_api_key", http_status=401)])
    assert life.summary == "rejected, HTTP 401, invalid_api_key"
    assert life.moments[0].text == "rejected with 401 invalid_api_key, no known key"


def test_what_was_told_again_is_told() -> None:
    joined = samples.replayed(running=True, after=3, by="last_event_id")
    life = tell(ID, [*samples.whole(), joined, samples.replayed()])
    assert life.summary.startswith("completed")
    texts = [moment.text for moment in life.moments]
    assert "told again while it ran (last_event_id), from event 4 on, key key_1; costs nothing" in texts
    assert "told again after its end (idempotency_key), from the beginning, key key_1; costs nothing" in texts


def test_a_failure_has_its_code() -> None:
    failed = samples.receipt(outcome="failed", code="upstream_error", upstream_status=500, usage=None, tokens_sent=3)
    life = tell(ID, [failed, samples.finished(status="failed", http_status=502, code="upstream_error", estimated=True)])
    assert "attempt 1 failed (upstream_error) at worker-1; openai as theirs, HTTP 500" in life.moments[0].text
    assert "no usage reported, 3 tokens sent" in life.moments[0].text
    assert "failed (upstream_error) with HTTP 502" in life.moments[1].text
    assert "(estimated)" in life.moments[1].text


def test_a_request_under_way_is_open() -> None:
    assert tell(ID, [samples.accepted(price=Price())]).summary.startswith("open")
    assert "; free" in tell(ID, [samples.accepted(price=Price())]).moments[0].text


def test_a_price_that_nobody_stated_is_not_told_as_free() -> None:
    assert "; price unknown" in tell(ID, [samples.accepted(price=UNKNOWN)]).moments[0].text


def test_an_event_of_a_newer_release_is_mentioned() -> None:
    unknown = UnknownEvent(kind="node.online", v=1, members={"producer": "ingress-9"})
    assert tell(ID, [samples.accepted(), unknown]).moments[-1].kind == "node.online"


def test_every_class_of_tokens_is_told_once() -> None:
    usage = Usage(prompt_tokens=9, completion_tokens=8, cached_tokens=1, reasoning_tokens=2, audio_prompt_tokens=3)
    assert (
        "9 prompt + 8 completion tokens (1 cached, 2 reasoning, 3 audio)"
        in tell(ID, [samples.finished(usage=usage)]).summary
    )


def test_the_json_has_the_story_and_the_events() -> None:
    life = tell(ID, [samples.accepted()])
    told = as_json(life, ["raw"])
    assert told["completion_id"] == "chatcmpl-" + ID.replace("-", "")
    assert told["moments"][0]["at"] == "2026-11-20T12:00:00.100000Z"
    assert told["events"] == ["raw"]


def test_times_keep_their_microseconds() -> None:
    assert clock(samples.NOON_NS + 1_999) == "2026-11-20 12:00:00.000001"


def test_an_attempt_that_was_given_up_says_what_the_provider_said_and_what_it_cost_us() -> None:
    lost = samples.lost(
        epoch=1, code="upstream_rate_limited", upstream_status=429, usage=Usage(prompt_tokens=7), cost_pico=70
    )
    text = words(lost)
    assert text.startswith(
        "attempt 1 given up: upstream_rate_limited (worker-1 on r1, HTTP 429); at our cost: 7 prompt"
    )
