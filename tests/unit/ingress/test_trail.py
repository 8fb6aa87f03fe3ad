"""Where a request goes on after an attempt that came to nothing: every kind of error, every shape of plan."""

from __future__ import annotations

import pytest

from ingress.policy.routing import Leg, Plan
from ingress.policy.trail import ATTEMPTS_MAX, LOST_MAX, TRIES_PER_LEG_MAX, Reach, Trail, reach
from schemas import errors
from schemas.errors import (
    BacklogFull,
    BadRequest,
    LogUnavailable,
    PenstockError,
    ProviderAuth,
    ProviderFailed,
    ProviderRateLimited,
    ProviderRejected,
    QueueTimeout,
    QueueUnavailable,
    WorkerLost,
)
from schemas.ids import RouteId, WorkerId
from schemas.money import Price

W1, W2, W3 = (WorkerId(name) for name in ("w1", "w2", "w3"))


def leg(route: str, model: str = "m") -> Leg:
    return Leg(RouteId(route), model, Price())


class Fleet:
    """Who serves which route, and which routes are left alone."""

    def __init__(self, **workers: set[WorkerId]) -> None:
        self.workers = workers
        self.cooling: set[str] = set()

    def trail(self, *legs: Leg) -> Trail:
        return Trail(
            Plan(legs),
            workers=lambda at: self.workers.get(at.route, set()),
            is_up=lambda at: at.route not in self.cooling,
        )


def fail(trail: Trail, at: Leg, error: PenstockError, worker: WorkerId | None = W1) -> Leg | None:
    """An attempt at *at* begins and fails; where to next."""
    trail.begin(at)
    trail.failed(at, worker, error)
    return trail.next()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (WorkerLost(), Reach.WORKER),
        (ProviderFailed(), Reach.WORKER),
        (errors.ProviderUnreachable(), Reach.WORKER),
        (errors.ProviderTimeout(), Reach.WORKER),
        (errors.ProviderNonsense(), Reach.WORKER),
        (errors.FirstTokenTimeout(), Reach.WORKER),
        (errors.FrameGap(), Reach.WORKER),
        (QueueTimeout(), Reach.ROUTE),
        (BacklogFull(), Reach.ROUTE),
        (ProviderAuth(), Reach.ROUTE),
        (ProviderRateLimited(), Reach.ROUTE),
        (errors.Fault(), Reach.ROUTE),
        (ProviderRejected(status=404), Reach.ROUTE),
        (ProviderRejected(status=413), Reach.ROUTE),
        (ProviderRejected(status=400, upstream_code="context_length_exceeded"), Reach.ROUTE),
        (ProviderRejected(status=400, upstream_code="unsupported_parameter"), Reach.ROUTE),
        (ProviderRejected(status=400), Reach.MODEL),
        (ProviderRejected(status=422, upstream_code="content_filter"), Reach.MODEL),
        (BadRequest(), Reach.REQUEST),
        (QueueUnavailable(), Reach.REQUEST),
        (LogUnavailable(), Reach.REQUEST),
        (errors.TotalTimeout(), Reach.ROUTE),
        (PenstockError(), Reach.REQUEST),
    ],
    ids=lambda value: value.code if isinstance(value, PenstockError) else value.name,
)
def test_how_far_an_error_reaches(error: PenstockError, expected: Reach) -> None:
    assert reach(error) is expected


def test_routes_are_tried_in_the_order_of_the_plan_each_once() -> None:
    legs = [leg("a"), leg("b"), leg("c")]
    trail = Fleet(a={W1}, b={W1}, c={W1}).trail(*legs)
    assert fail(trail, legs[0], ProviderFailed()) == legs[1]
    assert fail(trail, legs[1], ProviderFailed()) == legs[2]
    assert fail(trail, legs[2], ProviderFailed()) is None


def test_a_route_that_nobody_serves_any_more_is_left_out() -> None:
    trail = Fleet(a={W1}, c={W1}).trail(leg("a"), leg("b"), leg("c"))
    assert fail(trail, leg("a"), ProviderFailed()) == leg("c")


def test_a_route_that_cools_down_comes_after_the_others() -> None:
    fleet = Fleet(a={W1}, b={W1}, c={W1})
    fleet.cooling = {"b"}
    trail = fleet.trail(leg("a"), leg("b"), leg("c"))
    assert fail(trail, leg("a"), ProviderFailed()) == leg("c")
    assert fail(trail, leg("c"), ProviderFailed()) == leg("b")


def test_another_worker_of_the_route_is_tried_after_the_other_routes_and_the_failed_one_is_excluded() -> None:
    trail = Fleet(a={W1, W2}, b={W3}).trail(leg("a"), leg("b"))
    assert fail(trail, leg("a"), ProviderFailed(), W1) == leg("b")
    assert fail(trail, leg("b"), ProviderFailed(), W3) == leg("a")
    assert trail.not_workers(leg("a")) == (W1,)
    assert fail(trail, leg("a"), ProviderFailed(), W2) is None


def test_a_pool_is_not_tried_through() -> None:
    trail = Fleet(a={WorkerId(f"w{n}") for n in range(10)}).trail(leg("a"))
    for number in range(1, TRIES_PER_LEG_MAX):
        assert fail(trail, leg("a"), ProviderFailed(), WorkerId(f"w{number}")) == leg("a")
    assert fail(trail, leg("a"), ProviderFailed(), WorkerId("w9")) is None


@pytest.mark.parametrize("error", [ProviderRateLimited(), ProviderAuth(), QueueTimeout(), BacklogFull()])
def test_what_is_the_accounts_or_the_pools_is_not_tried_at_another_worker(error: PenstockError) -> None:
    trail = Fleet(a={W1, W2}).trail(leg("a"))
    assert fail(trail, leg("a"), error) is None


def test_a_lost_worker_is_waited_for_where_there_is_no_other() -> None:
    trail = Fleet().trail(leg("a"))
    assert fail(trail, leg("a"), WorkerLost()) == leg("a")
    assert trail.not_workers(leg("a")) == ()


def test_a_lost_worker_that_is_back_may_have_it_again_if_nobody_else_can() -> None:
    fleet = Fleet(a={W1})
    trail = fleet.trail(leg("a"))
    assert fail(trail, leg("a"), WorkerLost()) == leg("a")
    assert trail.not_workers(leg("a")) == ()
    fleet.workers["a"] = {W1, W2}
    assert trail.not_workers(leg("a")) == (W1,)


def test_a_request_does_not_bring_more_than_so_many_workers_down() -> None:
    trail = Fleet(a={W1, W2, W3}).trail(leg("a"))
    for _ in range(1, LOST_MAX):
        assert fail(trail, leg("a"), WorkerLost()) == leg("a")
    assert fail(trail, leg("a"), WorkerLost()) is None


def test_a_rejected_request_goes_on_only_with_another_model() -> None:
    legs = [leg("a"), leg("b"), leg("a", "other")]
    trail = Fleet(a={W1}, b={W1}).trail(*legs)
    assert fail(trail, legs[0], ProviderRejected(status=400)) == legs[2]
    assert fail(trail, legs[2], ProviderRejected(status=400)) is None


def test_a_rejection_by_the_place_goes_on_with_the_same_model() -> None:
    trail = Fleet(a={W1, W2}, b={W1}).trail(leg("a"), leg("b"))
    assert fail(trail, leg("a"), ProviderRejected(status=404)) == leg("b")


@pytest.mark.parametrize("error", [BadRequest(), QueueUnavailable(), LogUnavailable()])
def test_what_no_route_can_help_ends_the_request(error: PenstockError) -> None:
    assert fail(Fleet(a={W1}, b={W1}).trail(leg("a"), leg("b")), leg("a"), error) is None


def test_there_is_a_bound_on_all_attempts() -> None:
    legs = [leg(f"r{n}") for n in range(2 * ATTEMPTS_MAX)]
    trail = Fleet(**{each.route: {W1} for each in legs}).trail(*legs)
    at: Leg | None = legs[0]
    tried = 0
    while at is not None:
        tried += 1
        at = fail(trail, at, ProviderFailed())
    assert tried == ATTEMPTS_MAX


def test_a_race_is_run_on_another_route_with_the_same_model_that_is_up() -> None:
    fleet = Fleet(a={W1}, b={W1}, c={W1}, d=set())
    fleet.cooling = {"b"}
    trail = fleet.trail(leg("a"), leg("a", "n"), leg("d"), leg("b"), leg("c", "n"), leg("c"))
    trail.begin(leg("a"))
    assert trail.beside(leg("a")) == leg("c")
    trail.begin(leg("c"))
    assert trail.beside(leg("a")) is None


def test_a_waiting_job_looks_elsewhere_when_its_route_has_nobody_left() -> None:
    fleet = Fleet(a={W1}, b={W1})
    trail = fleet.trail(leg("a"), leg("b"))
    trail.begin(leg("a"))
    assert not trail.elsewhere(leg("a"))
    fleet.workers["a"] = set()
    assert trail.elsewhere(leg("a"))
    fleet.workers["b"] = set()
    assert not trail.elsewhere(leg("a"))


def test_what_was_tried_is_told_in_one_line() -> None:
    trail = Fleet(a={W1}).trail(leg("openai"), leg("my pc"), leg('ü"\\'))
    fail(trail, leg("openai"), ProviderRateLimited(status=429))
    fail(trail, leg("my pc"), QueueTimeout(), None)
    fail(trail, leg('ü"\\'), WorkerLost())
    assert trail.told() == (
        'openai;code=upstream_rate_limited;status=429, "my pc";code=queue_timeout, "?\\"\\\\";code=worker_lost'
    )
