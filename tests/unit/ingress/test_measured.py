"""How fast a place is, and how that is forgotten."""

from __future__ import annotations

import math

import pytest

from ingress.policy.fading import RESCALE_AT, Fading
from ingress.policy.measured import (
    BUCKET_RATIO,
    HALF_LIFE_S,
    P95_ANSWERS_MIN,
    PLACES_MAX,
    SLICE_S,
    SLICES,
    LastMinute,
    Measured,
)
from schemas.ids import RouteId

A, B = RouteId("a"), RouteId("b")


def _note(measured: Measured, route: RouteId = A, *, now: float, first_ms: float, tokens: int = 11) -> None:
    """An answer whose tokens came 10 ms apart, after the first."""
    duration_ms = first_ms + 10 * (tokens - 1)
    measured.note(
        route,
        "m",
        stream=True,
        ttft_us=int(first_ms * 1000),
        tokens=tokens,
        duration_us=int(duration_ms * 1000),
        now=now,
    )


def test_a_place_without_answers_is_unknown() -> None:
    measured = Measured()
    assert measured.speed(A, "m", stream=True, now=0) is None
    assert measured.p95_ttft(A, "m", stream=True, now=0) is None


def test_the_speed_is_the_mean_of_the_answers() -> None:
    measured = Measured()
    _note(measured, now=0, first_ms=100)
    _note(measured, now=0, first_ms=300)
    speed = measured.speed(A, "m", stream=True, now=0)
    assert speed is not None
    assert speed.first_token_us == pytest.approx(200_000)
    assert speed.tokens_per_s == pytest.approx(100)
    assert measured.speed(A, "m", stream=False, now=0) is None
    assert measured.speed(B, "m", stream=True, now=0) is None


def test_an_old_answer_counts_half_after_each_half_life() -> None:
    measured = Measured()
    _note(measured, now=0, first_ms=100)
    _note(measured, now=HALF_LIFE_S, first_ms=400)
    speed = measured.speed(A, "m", stream=True, now=HALF_LIFE_S)
    assert speed is not None
    assert speed.first_token_us == pytest.approx(300_000)


def test_a_place_that_nobody_asked_for_long_is_unknown_again() -> None:
    measured = Measured()
    _note(measured, now=0, first_ms=100)
    assert measured.speed(A, "m", stream=True, now=3 * HALF_LIFE_S) is not None
    assert measured.speed(A, "m", stream=True, now=4 * HALF_LIFE_S) is None


def test_an_answer_of_one_token_tells_no_pace() -> None:
    measured = Measured()
    _note(measured, now=0, first_ms=100, tokens=1)
    speed = measured.speed(A, "m", stream=True, now=0)
    assert speed is not None
    assert speed.tokens_per_s == math.inf


def test_p95_is_what_five_in_a_hundred_exceed() -> None:
    measured = Measured()
    for i in range(100):
        _note(measured, now=i / 100, first_ms=5000 if i % 25 == 0 else 200)  # four of them
    p95 = measured.p95_ttft(A, "m", stream=True, now=1)
    assert p95 is not None
    assert 200_000 <= p95 <= 200_000 * BUCKET_RATIO
    for i in range(10):
        _note(measured, now=1 + i / 100, first_ms=5000)
    p95 = measured.p95_ttft(A, "m", stream=True, now=2)
    assert p95 is not None
    assert 5_000_000 <= p95 <= 5_000_000 * BUCKET_RATIO


def test_p95_needs_answers() -> None:
    measured = Measured()
    for _ in range(P95_ANSWERS_MIN - 1):
        _note(measured, now=0, first_ms=200)
    assert measured.p95_ttft(A, "m", stream=True, now=0) is None
    _note(measured, now=0, first_ms=200)
    assert measured.p95_ttft(A, "m", stream=True, now=0) is not None


@pytest.mark.parametrize("us", [0, 1, 10**15])
def test_every_time_has_a_bucket(us: int) -> None:
    measured = Measured()
    for _ in range(P95_ANSWERS_MIN):
        measured.note(A, "m", stream=True, ttft_us=us, tokens=2, duration_us=us + 1, now=0)
    assert measured.p95_ttft(A, "m", stream=True, now=0) is not None


def test_the_places_that_are_remembered_are_bounded() -> None:
    measured = Measured()
    for i in range(PLACES_MAX + 10):
        measured.note(RouteId(str(i)), "m", stream=True, ttft_us=1, tokens=2, duration_us=2, now=0)
    assert measured.speed(RouteId("9"), "m", stream=True, now=0) is None
    assert measured.speed(RouteId("10"), "m", stream=True, now=0) is not None
    assert len(measured._places) == PLACES_MAX


def test_sums_fade_alike_over_any_time() -> None:
    """Past the rescaling, too, and over a gap that no double spans."""
    sums = Fading(2, half_life_s=1, now=0)
    sums.add(0, 8, now=0)
    sums.add(1, 8, now=2)
    assert sums.all(now=3) == pytest.approx([1, 4])
    late = RESCALE_AT + 4
    sums.add(1, 8, now=late)
    assert sums.all(now=late) == pytest.approx([0, 8])
    assert sums.all(now=1e9) == pytest.approx([0, 0])
    sums.add(0, 8, now=1e9)
    assert sums.all(now=1e9 + 1) == pytest.approx([4, 0])


def test_the_last_minute_forgets_by_the_slice() -> None:
    used = LastMinute()
    used.add(A, 5, now=0)
    used.add(A, 7, now=SLICE_S)
    used.add(B, 1, now=SLICE_S)
    assert (used.tokens(A, now=SLICE_S), used.tokens(B, now=SLICE_S)) == (12, 1)
    assert used.tokens(A, now=SLICE_S * SLICES) == 7
    assert used.tokens(A, now=SLICE_S * (SLICES + 1)) == 0
    for i in range(100):
        used.add(A, 1, now=100 + i * SLICE_S)
    assert len(used._slices) == SLICES
