"""The verdict finds each kind of broken promise, and none where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.faults.deployment import MODEL
from tests.faults.prompts import Prompt, Word
from tests.faults.records import End, Record
from tests.faults.runner import noticed
from tests.faults.unrecorded import killed_line, unrecorded
from tests.faults.verdict import Entry, Evidence, Kind, Problem, cost_pico, judge
from tests.faults.witness import Generation

PROMPT = Prompt("a1-1", 4, 0)
REQUEST = "01a1fde8-904b-7383-8caa-d8d83bcf465d"


def text(*generations: int) -> str:
    """An answer whose words are said by these generations, in order."""
    return "".join(Word(PROMPT.name, place, number).piece for place, number in enumerate(generations))


def record(**changes: Any) -> Record:
    usual: dict[str, Any] = {
        "prompt": PROMPT,
        "model": MODEL,
        "stream": True,
        "began_s": 0.0,
        "end": End.COMPLETED,
        "request_id": REQUEST,
        "status": 200,
        "text": text(1, 1, 1, 1),
        "finish_reason": "stop",
        "usage": (PROMPT.tokens, PROMPT.words),
    }
    return Record(**{**usual, **changes})


def entry(**changes: Any) -> Entry:
    """As the ledger has it, with its cost worked out."""
    made = Entry(
        request_id=REQUEST,
        status="completed",
        code=None,
        http_status=200,
        prompt_hash=PROMPT.hash,
        prompt_tokens=PROMPT.tokens,
        completion_tokens=PROMPT.words,
        cached_tokens=PROMPT.cached_tokens,
        accepted_events=1,
        ended_events=1,
    )
    made = replace(made, **{name: value for name, value in changes.items() if not name.endswith("_pico")})
    costs = {"cost_pico": cost_pico(made), "event_cost_pico": cost_pico(made)}
    return replace(made, **{name: changes.get(name, cost) for name, cost in costs.items()})


def generation(number: int = 1, *, given: str = "", said: int = PROMPT.words) -> Generation:
    return Generation(PROMPT, number, given, start=len(given.split()), began_s=0.0, said=said, whole=True)


def found(
    records: list[Record] | None = None,
    generations: list[Generation] | None = None,
    entries: list[Entry] | None = None,
) -> list[Problem]:
    said = {PROMPT.name: [generation()] if generations is None else generations}
    return judge(Evidence([record()] if records is None else records, said, [entry()] if entries is None else entries))


def rules(problems: list[Problem]) -> set[tuple[Kind, str]]:
    return {(problem.kind, problem.rule) for problem in problems}


def test_nothing_is_found_where_all_is_well() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("kind", "rule", "entries"),
    [
        (Kind.LOST, "what a client was answered is in the ledger", []),
        (Kind.LOST, "every accepted request ends", [entry(status="open", ended_events=0)]),
        (Kind.LOST, "every request that ends was accepted", [entry(accepted_events=0)]),
        (Kind.DUPLICATED, "every request begins and ends once", [entry(ended_events=2)]),
        (Kind.DUPLICATED, "a request has one row", [entry(), entry()]),
        (Kind.DUPLICATED, "a request is accepted once", [entry(), entry(request_id="another")]),
        (Kind.WRONG, "the sum of costs is that of the events", [entry(event_cost_pico=1)]),
        (Kind.WRONG, "the cost is tokens times price", [entry(cost_pico=1, event_cost_pico=1)]),
        (Kind.WRONG, "billed is what was delivered", [entry(completion_tokens=3)]),
        (Kind.WRONG, "what completed is billed as the provider counted", [entry(estimated=True)]),
        (Kind.WRONG, "the prompt is billed as counted", [entry(prompt_tokens=PROMPT.tokens + 1)]),
        (Kind.WRONG, "who was answered has completed", [entry(status="cancelled")]),
    ],
)
def test_a_ledger_that_tells_something_else_is_found_out(kind: Kind, rule: str, entries: list[Entry]) -> None:
    assert (kind, rule) in rules(found(entries=entries))


@pytest.mark.parametrize(
    ("second", "twice"),
    [
        ({"ingress": "ingress-1"}, True),
        ({"ingress": "ingress-2"}, False),
        ({"ingress": "ingress-1", "cost_pico": 0}, False),
        ({"ingress": "ingress-1", "announced": False}, False),  # of release 0.1.0, which knows no Idempotency-Key
    ],
)
def test_what_has_an_idempotency_key_is_billed_once_by_an_ingress_that_knows_of_it(
    second: dict[str, Any], twice: bool
) -> None:
    first = entry(ingress="ingress-1", announced=second.get("announced", True))
    said = rules(found([record(key="k")], entries=[first, replace(first, request_id="another", **second)]))
    assert ((Kind.DUPLICATED, "what has an Idempotency-Key is billed once by an ingress") in said) is twice


@pytest.mark.parametrize(
    ("kind", "rule", "changes"),
    [
        (Kind.WRONG, "each word is in its place", {"text": text(1, 1, 1, 1).replace(":2:", ":1:")}),
        (Kind.WRONG, "each word is in its place", {"text": text(1, 1, 1, 1).replace("a1-1:2", "b7-1:2")}),
        (Kind.WRONG, "no byte is added or lost", {"text": text(1, 1, 1, 1).replace(" ", "  ")}),
        (Kind.WRONG, "no stream mixes two attempts", {"text": text(1, 1, 2, 2)}),
        (Kind.WRONG, "a completed answer is whole", {"text": text(1, 1, 1)}),
        (Kind.WRONG, "a completed answer is whole", {"finish_reason": None}),
        (Kind.WRONG, "a completed answer's usage is the provider's", {"usage": (1, 4)}),
        (Kind.WRONG, "no answer ends without a reason", {"end": End.SILENT}),
        (Kind.WRONG, "an error is told as it is recorded", {"end": End.FAILED, "code": "worker_lost"}),
        (Kind.LOST, "every client hears an end", {"end": End.HUNG}),
    ],
)
def test_a_client_that_was_told_something_else_is_heard(kind: Kind, rule: str, changes: dict[str, Any]) -> None:
    assert (kind, rule) in rules(found([record(**changes)], [generation(), generation(2)]))


def test_an_answer_may_be_continued_by_who_was_given_what_was_delivered() -> None:
    continued = generation(2, given=text(1, 1), said=2)
    assert found([record(text=text(1, 1, 2, 2))], [generation(said=2), continued]) == []


def test_an_answer_may_not_be_continued_behind_something_else() -> None:
    continued = generation(2, given=text(3, 3), said=2)
    problems = found([record(text=text(1, 1, 2, 2))], [generation(said=2), continued])
    assert rules(problems) == {(Kind.WRONG, "no stream mixes two attempts")}


def test_an_error_in_the_stream_is_billed_for_exactly_what_was_delivered() -> None:
    heard = record(end=End.FAILED, code="worker_lost", text=text(1, 1), usage=None, finish_reason=None)
    failed = {"status": "failed", "code": "worker_lost", "estimated": True, "prompt_tokens": PROMPT.estimated_tokens}
    assert found([heard], entries=[entry(**failed, cached_tokens=0, completion_tokens=2)]) == []
    billed = found([heard], entries=[entry(**failed, cached_tokens=0, completion_tokens=3)])
    assert rules(billed) == {(Kind.WRONG, "billed is what was delivered")}


def test_what_a_worker_that_died_behind_the_last_word_did_not_tell_is_estimated_and_nothing_else_is() -> None:
    heard = record(usage=(PROMPT.estimated_tokens, PROMPT.words))
    guess = {"estimated": True, "prompt_tokens": PROMPT.estimated_tokens, "cached_tokens": 0}
    assert found([heard], entries=[entry(**guess, counted=False)]) == []
    counted = found([heard], entries=[entry(**guess)])
    assert (Kind.WRONG, "what completed is billed as the provider counted") in rules(counted)
    short = found([heard], entries=[entry(**guess, counted=False, completion_tokens=3)])
    assert (Kind.WRONG, "billed is what was delivered") in rules(short)


@pytest.mark.parametrize(("tokens", "fine"), [(1, False), (2, True), (3, True), (4, False)])
def test_who_hung_up_is_billed_for_no_less_than_it_heard_and_no_more_than_was_made(tokens: int, fine: bool) -> None:
    heard = record(end=End.LEFT, text=text(1, 1), usage=None, finish_reason=None)
    cancelled = {"status": "cancelled", "code": "client_left", "http_status": 499, "estimated": True}
    problems = found([heard], [generation(said=3)], [entry(**cancelled, completion_tokens=tokens)])
    assert (problems == []) is fine


def test_a_refusal_while_the_log_is_away_may_die_with_its_ingress_and_an_answer_may_not() -> None:
    refused = record(end=End.FAILED, status=503, code="queue_unavailable", text="", usage=None)
    assert found([refused], [], []) == []
    told = rules(found([replace(refused, code="upstream_error")], [], []))
    assert told == {(Kind.LOST, "what a client was answered is in the ledger")}


def test_who_was_cut_off_from_the_log_may_give_the_failure_another_name_but_must_not_call_it_a_success() -> None:
    closed = {"status": "failed", "code": "ingress_lost", "http_status": 502, "completion_tokens": 0}
    closed |= {"prompt_tokens": 0, "cached_tokens": 0}
    failed = record(end=End.FAILED, code="stopping", text="", usage=None)
    assert found([failed], entries=[entry(**closed)]) == []
    assert (Kind.WRONG, "who was answered has completed") in rules(found([record()], entries=[entry(**closed)]))


def test_what_nobody_lived_to_tell_may_be_billed_at_nothing() -> None:
    heard = record(end=End.BROKEN, text=text(1, 1), usage=None, finish_reason=None)
    closed = {
        "status": "failed",
        "code": "ingress_lost",
        "completion_tokens": 0,
        "prompt_tokens": 0,
        "cached_tokens": 0,
    }
    assert found([heard], entries=[entry(**closed, receipts=0)]) == []
    assert rules(found([heard], entries=[entry(**closed, receipts=1)])) == {
        (Kind.WRONG, "billed is what was delivered")
    }


def test_an_answer_that_went_on_behind_its_text_is_billed_by_an_estimate_and_says_so() -> None:
    assert found(entries=[entry(estimated=True, migrations=1, behind_text=1)]) == []
    assert rules(found(entries=[entry(estimated=True, migrations=1)])) == {
        (Kind.WRONG, "what completed is billed as the provider counted")
    }


def test_what_never_arrived_leaves_no_trace_and_needs_none() -> None:
    lost = record(end=End.BROKEN, request_id=None, status=None, text="", usage=None)
    assert found([lost], [], []) == []
    assert rules(found([lost], [generation()], [])) == {(Kind.LOST, "what was generated is in the ledger")}
    told = Evidence([lost], {PROMPT.name: [generation()]}, [], frozenset([generation().name]))
    assert judge(told) == []


def test_a_receipt_of_an_attempt_that_was_stopped_before_its_answer_came_is_known_by_its_workers_name() -> None:
    """The client had left, its ingress was fenced off, and the provider had said all: nobody had heard what it calls that."""
    left = record(end=End.LEFT, request_id=None, status=None, text="", usage=None)
    said = generation()
    said.asked_as = f"{REQUEST}.1"
    for receipts, problems in (({f"{REQUEST}.1"}, 0), ({f"{REQUEST}.2"}, 1), (set[str](), 1)):
        assert len(judge(Evidence([left], {PROMPT.name: [said]}, [], frozenset(receipts)))) == problems


def test_a_request_without_an_answer_is_noticed_only_if_somebody_took_it() -> None:
    """A connection that ends before anything was read of it is dialled again by every SDK."""
    broken = record(end=End.BROKEN, request_id=None)
    assert list(noticed(Evidence([broken], {}, []))) == []
    assert len(list(noticed(Evidence([broken], {}, [entry()])))) == 1
    assert len(list(noticed(Evidence([record(end=End.FAILED)], {}, [])))) == 1


def test_a_refusal_may_only_be_missing_if_its_ingress_said_that_it_was_not_recorded_and_was_killed_soon() -> None:
    refused = record(end=End.FAILED, status=503, code="no_live_route", text="", usage=None, ended_s=100.0)
    for killed, said, missed in (
        ({REQUEST: 105.0}, [], False),
        ({}, [], True),
        ({"another": 105.0}, [], True),
        ({REQUEST: 99.0}, [], True),
        ({REQUEST: 130.0}, [], True),
        ({REQUEST: 105.0}, [generation()], True),
    ):
        assert bool(judge(Evidence([refused], {PROMPT.name: said}, [], unrecorded=killed))) is missed


def test_an_ingress_log_tells_which_refusals_died_with_it() -> None:
    def line(event: str, **more: str) -> bytes:
        return json.dumps({**more, "event": event}, separators=(",", ":")).encode() + b"\n"

    unsaid = "rejection_not_recorded_in_time"
    life = [line("listening"), line(unsaid, code="overloaded"), line(unsaid, request_id="a"), line("stopping")]
    killed = killed_line(7.5).splitlines(keepends=True)
    assert list(unrecorded([*life, *killed, line(unsaid, request_id="b")])) == [("a", 7.5)]
    assert list(unrecorded([*life, line("stopped"), line("listening"), *killed])) == []
