"""Whose word counts for each of the four time-outs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingress.policy.waits import NOT_SAID, Waits, asked
from schemas.errors import (
    BadRequest,
    FirstTokenTimeout,
    IdleTimeout,
    PenstockError,
    ProviderFailed,
    ProviderTimeout,
    QueueTimeout,
    TotalTimeout,
)
from schemas.jobs import TimeLimits, Timeouts

DEFAULT = Timeouts(queue_s=60, first_token_s=300, idle_s=120, total_s=3600)
MOST = Timeouts(queue_s=600, first_token_s=1800, idle_s=600, total_s=14_400)


def waits(*, key: TimeLimits = NOT_SAID, own: TimeLimits = NOT_SAID) -> Waits:
    return Waits(DEFAULT, MOST, key, own)


def test_without_a_word_the_operators_hold_and_nothing_is_made() -> None:
    assert waits().at() is DEFAULT
    assert waits().total_s == 3600


def test_the_more_specific_counts() -> None:
    route, key, own = TimeLimits(idle_s=30), TimeLimits(idle_s=20), TimeLimits(idle_s=10)
    assert waits().at(route).idle_s == 30
    assert waits(key=key).at(route).idle_s == 20
    assert waits(key=key, own=own).at(route).idle_s == 10
    assert waits(own=own).at(route) == Timeouts(queue_s=60, first_token_s=300, idle_s=10, total_s=3600)


def test_a_request_may_ask_for_longer_as_far_as_the_operator_allows() -> None:
    assert waits(own=TimeLimits(queue_s=500)).at().queue_s == 500
    assert waits(own=TimeLimits(queue_s=5000)).at().queue_s == 600


def test_a_request_may_not_ask_for_more_than_its_key_has() -> None:
    assert waits(key=TimeLimits(total_s=100), own=TimeLimits(total_s=200)).total_s == 100
    assert waits(key=TimeLimits(total_s=20_000), own=TimeLimits(total_s=19_000)).total_s == 19_000


def test_a_slow_route_may_have_longer_than_a_request_could_ask_for() -> None:
    slow = TimeLimits(first_token_s=7200)
    assert waits().at(slow).first_token_s == 7200
    assert waits(own=TimeLimits(first_token_s=7000)).at(slow).first_token_s == 7000
    assert waits(own=TimeLimits(first_token_s=9000)).at(slow).first_token_s == 7200


def test_a_routes_total_is_an_attempts_and_not_the_requests() -> None:
    assert waits().at(TimeLimits(total_s=50)).total_s == 50
    assert waits(own=TimeLimits(total_s=40)).at(TimeLimits(total_s=50)).total_s == 40
    assert waits().at(TimeLimits(total_s=50_000)).total_s == 3600
    assert waits(key=TimeLimits(total_s=70)).total_s == 70


def test_the_headers_are_read_in_seconds() -> None:
    headers = [
        (b"x-penstock-timeout-queue", b"1"),
        (b"x-penstock-timeout-first-token", b"2.5"),
        (b"x-penstock-timeout-idle", b"0.25"),
        (b"x-penstock-timeout-total", b"90"),
        (b"authorization", b"Bearer x"),
    ]
    assert asked(headers) == TimeLimits(queue_s=1.0, first_token_s=2.5, idle_s=0.25, total_s=90.0)
    assert asked([(b"authorization", b"Bearer x")]) is NOT_SAID


@pytest.mark.parametrize(
    "value", [b"", b"0", b"0.0", b"-1", b"abc", b"nan", b"inf", b"1e9", b"1s", b" 1", b"1,5", b"0x1", b"9" * 30]
)
def test_what_is_no_time_is_refused_with_the_headers_name(value: bytes) -> None:
    with pytest.raises(BadRequest, match="x-penstock-timeout-idle") as caught:
        asked([(b"x-penstock-timeout-idle", value)])
    assert caught.value.param == "x-penstock-timeout-idle"


def test_a_time_out_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(BadRequest, match="x-penstock-timeout-first-token"):
        asked([(b"x-penstock-timeout-first_token", b"1")])


@given(value=st.binary(max_size=40))
def test_no_value_breaks_it(value: bytes) -> None:
    try:
        found = asked([(b"x-penstock-timeout-total", value)])
    except BadRequest:
        return
    assert found.total_s is not None
    assert found.total_s > 0


@pytest.mark.parametrize(
    ("error", "own", "impatient"),
    [
        (QueueTimeout(), TimeLimits(queue_s=59), True),
        (QueueTimeout(), TimeLimits(queue_s=60), False),
        (QueueTimeout(), TimeLimits(idle_s=1), False),
        (FirstTokenTimeout(), TimeLimits(first_token_s=1), True),
        (IdleTimeout(), TimeLimits(idle_s=29), True),
        (IdleTimeout(), TimeLimits(idle_s=30), False),
        (TotalTimeout(), TimeLimits(total_s=1), True),
        (ProviderTimeout(), TimeLimits(first_token_s=1), True),
        (ProviderTimeout(), TimeLimits(queue_s=1), False),
        (ProviderFailed(), TimeLimits(queue_s=1, first_token_s=1, idle_s=1, total_s=1), False),
    ],
)
def test_a_time_out_that_was_made_shorter_says_nothing_of_the_route(
    error: PenstockError, own: TimeLimits, impatient: bool
) -> None:
    """The route itself says 30 s between tokens."""
    assert waits(own=own).impatient(error, TimeLimits(idle_s=30)) is impatient
    assert waits(key=own).impatient(error, TimeLimits(idle_s=30)) is impatient
