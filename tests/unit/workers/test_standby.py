"""Who waits at a worker for a slot."""

from __future__ import annotations

from schemas.ids import RouteId, new_nonce
from schemas.jobs import Job
from tests.factories import new_job
from workers.standby import STANDBY_MAX, Standby

HERE, THERE = RouteId("here"), RouteId("there")


class Now:
    s = 0.0

    def __call__(self) -> float:
        return self.s


def job(accepted_ns: int = 1, *, route: RouteId = HERE) -> Job:
    return new_job(nonce=new_nonce(), route=route, accepted_ns=accepted_ns)


def test_the_oldest_request_comes_first_whenever_it_joined() -> None:
    standby = Standby(Now())
    young, old, other = job(9), job(3), job(1, route=THERE)
    for each in (young, old, other):
        standby.join(each, for_s=5.0)
    assert [standby.take(HERE) for _ in range(3)] == [old, young, None]
    assert standby.take(THERE) == other


def test_nobody_is_served_after_his_time_or_after_leaving() -> None:
    now = Now()
    standby = Standby(now)
    left, late, stays = job(1), job(2), job(3)
    standby.join(left, for_s=5.0)
    standby.join(late, for_s=1.0)
    standby.join(stays, for_s=5.0)
    standby.leave(left.nonce)
    now.s = 1.0
    assert standby.take(HERE) == stays
    assert standby.take(HERE) is None


def test_a_standby_is_bounded_and_who_has_left_makes_room() -> None:
    now = Now()
    standby = Standby(now)
    for number in range(STANDBY_MAX):
        standby.join(job(number), for_s=1.0)
    turned_away, later = job(), job()
    standby.join(turned_away, for_s=9.0)
    now.s = 2.0
    standby.join(later, for_s=1.0)
    assert standby.take(HERE) == later
    assert standby.take(HERE) is None
