"""When a client whose backlog is full shall come again: what is told against what really happens."""

from __future__ import annotations

import random

import pytest

from ingress.policy.drain import PLACES_MAX, RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S, Drain, Place
from schemas.ids import OrgId, RouteId

HERE: Place = (RouteId("r"), "m", OrgId("o"))
THERE: Place = (RouteId("r"), "m", OrgId("p"))


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("each_s", [0.05, 0.5, 4.0])
def test_it_is_about_the_time_in_which_the_backlog_is_begun(slots: int, each_s: float) -> None:
    drain, dice = Drain(), random.Random(7)
    waiting = 20
    for _ in range(waiting):
        drain.waits(HERE, now=0.0)
    ends = sorted(each_s * dice.uniform(0.5, 1.5) for _ in range(slots))
    now = 0.0
    for _ in range(60):  # one begins when a slot is free, and another one comes at once
        now = ends.pop(0)
        drain.began(HERE, now=now)
        drain.waits(HERE, now=now)
        ends = sorted([*ends, now + each_s * dice.uniform(0.5, 1.5)])
    real_s = waiting * each_s / slots
    told_s = drain.retry_after_s(HERE, now=now)
    assert told_s == pytest.approx(min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, real_s)), rel=0.4)


def test_a_queue_that_stands_still_takes_longer_and_longer() -> None:
    drain = Drain()
    for _ in range(10):
        drain.waits(HERE, now=0.0)
    assert drain.retry_after_s(HERE, now=0.01) == RETRY_AFTER_MIN_S
    assert drain.retry_after_s(HERE, now=2.0) == pytest.approx(20.0)
    assert drain.retry_after_s(HERE, now=100.0) == RETRY_AFTER_MAX_S


def test_starts_that_nobody_waited_for_say_nothing_of_the_workers() -> None:
    drain = Drain()
    for number in range(1000):
        drain.waits(HERE, now=number * 0.01)
        drain.began(HERE, now=number * 0.01 + 0.001)
    now = 10.0
    for _ in range(5):
        drain.waits(HERE, now=now)
    for number in range(1, 11):
        drain.began(HERE, now=now + number * 2.0)
        drain.waits(HERE, now=now + number * 2.0)
    assert drain.retry_after_s(HERE, now=now + 20.0) == pytest.approx(10.0, rel=0.2)


def test_each_place_has_its_own_line_and_what_left_waits_no_more() -> None:
    drain = Drain()
    for _ in range(100):
        drain.waits(HERE, now=0.0)
    drain.waits(THERE, now=0.0)
    assert drain.retry_after_s(THERE, now=3.0) == pytest.approx(3.0)
    for _ in range(99):
        drain.left(HERE)
    assert drain.retry_after_s(HERE, now=3.0) == pytest.approx(3.0)


def test_no_more_than_so_many_places_are_remembered() -> None:
    drain = Drain()
    for number in range(PLACES_MAX + 10):
        drain.waits((RouteId("r"), f"m{number}", OrgId("o")), now=0.0)
    assert len(drain._lines) == PLACES_MAX
    drain.left((RouteId("r"), "m0", OrgId("o")))  # forgotten meanwhile
    assert drain.retry_after_s((RouteId("r"), "m0", OrgId("o")), now=9.0) == RETRY_AFTER_MIN_S
