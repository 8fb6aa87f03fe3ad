"""When a provider is taken down and brought back, with a clock that is told the time."""

from __future__ import annotations

from workers.providers.health import LATENCIES_MIN, Health, HealthRules

RULES = HealthRules()


def health(first_token_max_s: float = 0.0) -> Health:
    return Health(RULES, first_token_max_s=first_token_max_s, dice=lambda: 0.5)


def fail(found: Health, times: int, now: float = 0.0) -> None:
    for _ in range(times):
        found.failed(now, "it fails")


def test_enough_failures_take_it_down_with_the_reason() -> None:
    found = health()
    fail(found, 7)
    assert found.down is None
    fail(found, 1)
    assert (found.down, found.probe_at) == ("it fails", RULES.probe_first_s)


def test_failures_among_many_good_answers_do_not() -> None:
    found = health()
    for _ in range(100):
        found.answered(0.0)
        found.answered(0.0)
        found.failed(0.0, "it fails")
    assert found.down is None
    assert found.told(0.0).error_rate == 0.333


def test_old_failures_fade() -> None:
    found = health()
    for hour in range(100):
        fail(found, 1, now=hour * 3600.0)
    assert found.down is None


def test_old_successes_fade_too() -> None:
    found = health()
    for _ in range(1000):
        found.answered(0.0)
    fail(found, 8, now=900.0)
    assert found.down is not None


def test_one_probe_that_is_answered_brings_it_back_as_new() -> None:
    found = health()
    fail(found, 20)
    found.probed(2.0, answer_s=0.1)
    assert (found.down, found.probe_at, found.error_rate(2.0)) == (None, None, 0.0)
    fail(found, 7, now=2.0)
    assert found.down is None


def test_probes_that_fail_come_less_and_less_often() -> None:
    found = health()
    fail(found, 8)
    waits, now = [], 0.0
    for _ in range(8):
        assert found.probe_at is not None
        waits.append(found.probe_at - now)
        now = found.probe_at
        found.probed(now, answer_s=None)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_the_time_of_a_probe_has_jitter() -> None:
    times = set()
    for place in (0.0, 0.5, 1.0):
        one = Health(RULES, dice=lambda place=place: place)
        fail(one, 8)
        times.add(one.probe_at)
    assert times == {0.75, 1.0, 1.25}


def test_streams_that_begin_too_late_take_it_down_where_a_bound_is_stated() -> None:
    found, patient = health(first_token_max_s=2.0), health()
    for each in (found, patient):
        for _ in range(LATENCIES_MIN):
            each.answered(0.0, first_token_s=3.0)
    assert found.down == "it begins to answer after 3.0 s; 2 s are allowed"
    assert patient.down is None
    assert patient.told(0.0).first_token_ms == 3000


def test_a_probe_that_is_too_slow_does_not_bring_it_back() -> None:
    found = health(first_token_max_s=2.0)
    for _ in range(LATENCIES_MIN):
        found.answered(0.0, first_token_s=3.0)
    found.probed(1.0, answer_s=2.5)
    assert found.down is not None
    found.probed(3.0, answer_s=0.5)
    assert found.down is None


def test_one_slow_stream_among_others_is_nothing() -> None:
    found = health(first_token_max_s=2.0)
    for seconds in (0.1, 60.0, 0.1, 60.0, 0.1, 0.1):
        found.answered(0.0, first_token_s=seconds)
    assert found.down is None
