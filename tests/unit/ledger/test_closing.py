"""What a request is billed whose ingress died: what the receipts say."""

from __future__ import annotations

import pytest

from ledger.closing import closing
from schemas.events import Event, RequestFinished, StreamMigrated
from schemas.ids import EventId
from schemas.money import Price, Usage, cost
from tests.unit.ledger import samples
from tests.unit.ledger.samples import MS_NS, NOON_NS, PRICE, USAGE

OTHER = Price(input=1, output=2)


def close(*events: Event) -> RequestFinished:
    end = closing(events, id_=EventId(samples.event_id()), now_ns=NOON_NS + 30_000 * MS_NS, producer="ledger")
    assert end is not None
    return end


def test_the_providers_own_figure_is_billed() -> None:
    end = close(samples.accepted(hold_pico=77), samples.started(), samples.receipt())
    assert (end.status, end.code, end.http_status) == ("failed", "ingress_lost", 502)
    assert (end.usage, end.estimated, end.price, end.cost_pico) == (USAGE, False, PRICE, cost(USAGE, PRICE))
    assert (end.hold_pico, end.attempts, end.route, end.worker, end.queue_us) == (77, 1, "r1", "worker-1", 2_000)
    assert (end.accepted_ns, end.duration_us) == (NOON_NS + 100 * MS_NS, 29_900_000)
    assert (end.producer, end.model, end.prompt_hash, end.stream) == ("ledger", "m", samples.PROMPT_HASH, True)


def test_without_it_what_was_sent_is_billed_and_marked_as_an_estimate() -> None:
    receipt = samples.receipt(usage=None, outcome="cancelled", code="ingress_lost", tokens_sent=7)
    end = close(samples.accepted(prompt_bytes=40), samples.started(), receipt)
    assert (end.usage, end.estimated) == (Usage(prompt_tokens=10, completion_tokens=7), True)
    assert end.cost_pico == cost(end.usage, PRICE)
    assert close(samples.accepted(body_bytes=90), receipt).usage.prompt_tokens == 90 // 4


@pytest.mark.parametrize(
    "events",
    [
        [],
        [samples.started()],
        [samples.receipt(usage=None, tokens_sent=0, outcome="failed", code="upstream_error")],
        [samples.receipt(usage=None, tokens_sent=0, outcome="cancelled", code="ingress_lost")],
        [samples.started(), samples.receipt(), samples.lost()],
    ],
    ids=["nothing began", "no receipt", "a fault", "nothing was sent", "given up"],
)
def test_what_gave_nothing_costs_nothing(events: list[Event]) -> None:
    end = close(samples.accepted(hold_pico=5), *events)
    assert (end.usage, end.estimated, end.cost_pico, end.hold_pico) == (Usage(), False, 0, 5)


def test_the_last_attempt_that_was_not_given_up_decides_at_its_own_price() -> None:
    second = {"epoch": 2, "route": "r2", "worker": "worker-2", "model": "m2"}
    end = close(
        samples.accepted(models=("m", "m2"), prices=(PRICE, OTHER)),
        samples.started(),
        samples.lost(),
        samples.receipt(usage=Usage(prompt_tokens=1, completion_tokens=1)),
        samples.receipt(**second),
        samples.started(epoch=2, route="r2", worker="worker-2"),
    )
    assert (end.price, end.cost_pico, end.usage) == (OTHER, cost(USAGE, OTHER), USAGE)
    assert (end.route, end.model, end.worker, end.attempts, end.epoch) == ("r2", "m2", "worker-2", 2, 2)


def test_an_answer_that_moved_is_billed_with_what_was_delivered_before() -> None:
    start = samples.started()
    moved = StreamMigrated(
        id=start.id,
        ts_ns=start.ts_ns,
        org=start.org,
        request_id=start.request_id,
        epoch=2,
        producer=start.producer,
        route=start.route,
        worker=start.worker,
        from_route=start.route,
        reason="worker_lost",
        how="exact",
        tokens_carried=5,
    )
    second = samples.receipt(epoch=2, usage=Usage(prompt_tokens=25, completion_tokens=3), tokens_sent=3)
    events = [samples.accepted(prompt_bytes=40), start, samples.lost(), moved]
    end = close(*events, second)
    assert (end.usage, end.estimated, end.migrations) == (Usage(prompt_tokens=10, completion_tokens=8), True, 1)
    assert close(*events).usage == Usage(prompt_tokens=10, completion_tokens=5)


def test_a_worker_tells_what_was_delivered_before_it_where_the_ingress_could_not() -> None:
    """It died with what it knew of the move; to the last worker's provider what was carried was prompt."""
    second = samples.receipt(epoch=2, usage=Usage(prompt_tokens=15, completion_tokens=7), tokens_carried=5)
    end = close(samples.accepted(prompt_bytes=40), samples.started(), second)
    assert (end.usage, end.estimated) == (Usage(prompt_tokens=10, completion_tokens=12), True)


def test_what_a_later_attempt_had_carried_is_not_added_to_the_receipt_of_the_one_that_it_came_from() -> None:
    """The ingress was cut off, took the worker for lost, moved the answer and died; the first worker had completed it."""
    first = samples.receipt(usage=Usage(prompt_tokens=15, completion_tokens=37), tokens_sent=37)
    second = samples.receipt(epoch=2, usage=None, outcome="cancelled", tokens_sent=0, tokens_carried=3)
    end = close(samples.accepted(), samples.started(), first, second)
    assert (end.usage, end.estimated, end.worker) == (first.usage, False, first.worker)


def test_of_an_answer_that_moved_while_its_first_worker_went_on_the_attempt_with_which_the_client_had_more_decides() -> (
    None
):
    first = samples.receipt(usage=None, outcome="cancelled", tokens_sent=5)
    second = samples.receipt(usage=None, outcome="cancelled", tokens_sent=4, tokens_carried=3, epoch=2)
    assert close(samples.accepted(), first, second).usage.completion_tokens == 7


def test_it_is_never_billed_less_than_the_client_is_known_to_have_had() -> None:
    """The last worker tells what it carried; the one whose receipt decides was only the first of three."""
    first = samples.receipt(usage=None, outcome="cancelled", tokens_sent=1)
    third = samples.receipt(usage=None, outcome="failed", tokens_sent=0, tokens_carried=2, epoch=3)
    end = close(samples.accepted(prompt_bytes=40), first, third)
    assert (end.usage, end.estimated) == (Usage(prompt_tokens=10, completion_tokens=2), True)


def test_of_two_attempts_side_by_side_the_one_that_gave_more_decides() -> None:
    """The ingress died before it could say which of them it had given up."""
    first = samples.receipt(usage=None, outcome="cancelled", tokens_sent=50)
    second = samples.receipt(usage=None, outcome="cancelled", tokens_sent=0, epoch=2, worker="worker-2")
    faulty = samples.receipt(usage=None, outcome="failed", tokens_sent=60, epoch=3, worker="worker-3")
    end = close(samples.accepted(), first, second, faulty)
    assert (end.worker, end.usage.completion_tokens, end.attempts) == ("worker-1", 50, 3)


def test_of_two_workers_with_the_same_job_the_one_that_the_ingress_heard_begin_decides() -> None:
    heard = samples.receipt(usage=None, outcome="failed", code="upstream_error", tokens_sent=9)
    unheard = samples.receipt(usage=None, outcome="cancelled", tokens_sent=10, worker="worker-2")
    end = close(samples.accepted(), samples.started(), unheard, heard)
    assert (end.worker, end.usage.completion_tokens) == ("worker-1", 9)


@pytest.mark.parametrize("code", ["begun_elsewhere", "hedge_lost"])
def test_what_another_attempt_outran_gave_its_client_nothing(code: str) -> None:
    """Also where it isn't on record which one the ingress heard begin."""
    outrun = samples.receipt(usage=None, outcome="cancelled", code=code, tokens_sent=3, worker="worker-2", epoch=2)
    assert close(samples.accepted(), outrun).usage == Usage()
    failed = samples.receipt(usage=None, outcome="failed", code="upstream_error", tokens_sent=9)
    end = close(samples.accepted(), failed, outrun)
    assert (end.worker, end.usage.completion_tokens) == ("worker-1", 9)


def test_an_answer_that_broke_off_is_billed_for_what_was_delivered_also_before_it_moved() -> None:
    """Its ingress died before the next attempt gave its first token, or before that was on record."""
    broken = samples.receipt(usage=None, outcome="failed", code="upstream_error", tokens_sent=5)
    events = [samples.accepted(prompt_bytes=40), samples.started(), broken, samples.lost(tokens_carried=5)]
    assert close(*events).usage == Usage(prompt_tokens=10, completion_tokens=5)
    second = samples.receipt(epoch=2, usage=Usage(prompt_tokens=25, completion_tokens=3), tokens_sent=3)
    assert close(*events, second).usage == Usage(prompt_tokens=10, completion_tokens=8)


def test_the_order_of_two_witnesses_does_not_matter() -> None:
    one = close(samples.accepted(), samples.started(), samples.receipt())
    other = close(samples.receipt(), samples.accepted(), samples.started())
    assert (one.usage, one.queue_us, one.route) == (other.usage, other.queue_us, other.route)


@pytest.mark.parametrize("last", [samples.finished(), samples.rejected()])
def test_what_has_ended_is_not_closed_again(last: Event) -> None:
    events = [samples.accepted(), samples.receipt(), last]
    assert closing(events, id_=EventId("x"), now_ns=NOON_NS, producer="ledger") is None
    assert closing([samples.receipt()], id_=EventId("x"), now_ns=NOON_NS, producer="ledger") is None
