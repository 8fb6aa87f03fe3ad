"""Windows and allowances, with a clock that is told the time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import make_job
from workers.providers.pace import LOOK_AGAIN_S, UNTOLD_RESET_S, Allowance, Expected, Window
from workers.providers.rate_headers import Told


@given(
    limit=st.integers(1, 20),
    waits=st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=80),
    start=st.floats(0, 1e6),
)
def test_no_minute_ever_holds_more_than_the_limit(limit: int, waits: list[float], start: float) -> None:
    """Whatever the times at which it is asked, and wherever the minute begins."""
    window, now, taken = Window(limit), start, []
    for wait_s in waits:
        now += wait_s
        if window.free_at(now, 1) <= now:
            window.take(now, 1)
            taken.append(now)
    for first in taken:
        assert sum(1 for at in taken if first <= at < first + 60.0) <= limit


@given(
    limit=st.integers(10, 1000),
    asked=st.lists(st.tuples(st.floats(0, 20, allow_nan=False), st.integers(1, 400)), min_size=1, max_size=60),
)
def test_no_minute_ever_holds_more_tokens_than_the_limit_but_for_one_that_is_larger(
    limit: int, asked: list[tuple[float, int]]
) -> None:
    window, now, taken = Window(limit), 0.0, []
    for wait_s, tokens in asked:
        now += wait_s
        if window.free_at(now, tokens) <= now:
            window.take(now, tokens)
            taken.append((now, tokens))
    for first, _ in taken:
        within = [tokens for at, tokens in taken if first <= at < first + 60.0]
        assert sum(within) <= limit or len(within) == 1


@given(limit=st.integers(1, 20), asked=st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=60))
def test_it_is_free_when_it_says_so(limit: int, asked: list[float]) -> None:
    window, now = Window(limit), 0.0
    for wait_s in asked:
        now += wait_s
        at = window.free_at(now, 1)
        assert now <= at <= now + 61.0
        assert window.free_at(at, 1) == at
        window.take(at, 1)
        now = at


def test_what_is_used_is_forgotten_after_a_minute_and_takes_no_memory() -> None:
    window = Window(0)
    for tenth in range(10_000):
        window.take(tenth / 10, 3)
    assert len(window._taken) < 10_000
    window.used(1000.0)
    assert len(window._taken) <= 123
    assert window.used(1100.0) == 0


def test_no_limit_is_none() -> None:
    window = Window(0)
    window.take(0.0, 10**9)
    assert window.free_at(0.0, 10**9) == 0.0


def told(allowance: Allowance, **figures: float | None) -> None:
    allowance.told(0.0, Told(**figures))  # type: ignore[arg-type]  # whole numbers


def test_an_allowance_knows_nothing_before_it_is_told() -> None:
    assert Allowance().free_at(0.0, 10**9) == 0.0


def test_a_limit_of_a_minute_is_waited_for_until_its_reset() -> None:
    allowance = Allowance()
    told(allowance, limit=60, left=0, reset_s=40.0)
    assert allowance.free_at(10.0, 1) == 40.0


def test_a_limit_of_a_day_comes_back_bit_by_bit() -> None:
    """As Groq tells it: 14400 a day, of which 30 are used, are whole again in 180 s."""
    allowance = Allowance()
    told(allowance, limit=14_400, left=0, reset_s=86_400.0)
    assert allowance.free_at(0.0, 1) == pytest.approx(6.0)


def test_after_the_reset_the_whole_limit_is_there_and_no_more() -> None:
    allowance = Allowance()
    told(allowance, limit=2, left=0, reset_s=10.0)
    for _ in range(2):
        assert allowance.free_at(10.0, 1) == 10.0
        allowance.take(1)
    assert allowance.free_at(10.0, 1) == 10.0 + LOOK_AGAIN_S, "the answers under way will tell"


def test_a_provider_that_tells_nothing_more_after_a_reset_is_not_waited_for_for_ever() -> None:
    """A key whose figures no longer came was used up for good: nothing gave back what its answers had taken."""
    allowance = Allowance()
    told(allowance, limit=3, left=0, reset_s=10.0)
    for _ in range(20):
        assert allowance.free_at(11.0, 1) == 11.0
        allowance.take(1)
        allowance.answered(1)


def test_a_reset_that_is_not_told_is_guessed() -> None:
    allowance = Allowance()
    told(allowance, left=0)
    assert allowance.free_at(0.0, 1) == UNTOLD_RESET_S
    assert allowance.free_at(UNTOLD_RESET_S, 10**6) == UNTOLD_RESET_S


def test_more_than_the_whole_limit_may_be_sent_when_all_of_it_is_left() -> None:
    allowance = Allowance()
    told(allowance, limit=100, left=100, reset_s=0.0)
    assert allowance.free_at(0.0, 5000) == 0.0


def test_a_jobs_tokens_are_expected_as_answers_were_so_far_within_its_own_bound() -> None:
    expected, job = Expected(), make_job(b'{"model":"m","x":"' + b"x" * 381 + b'"}')
    first = expected.tokens(job)
    for _ in range(100):
        expected.note(20)
    assert first == 100 + 256
    assert expected.tokens(job) == pytest.approx(100 + 20, abs=2)
    assert expected.tokens(make_job(b'{"max_tokens":5}')) == 4 + 5
    assert expected.tokens(make_job(b'{"max_completion_tokens":7,"max_tokens":5}')) == 10 + 7


@pytest.mark.parametrize("body", [b"", b"[]", b'{"max_tokens":"many"}', b'{"max_tokens":-3}'])
def test_a_body_that_the_provider_will_refuse_is_no_hindrance(body: bytes) -> None:
    assert Expected().tokens(make_job(body)) > 0
