"""How many second attempts there may be."""

from __future__ import annotations

from ingress.hedging import SAVED_MAX, SHARE, Hedges
from ingress.policy.routing import Leg
from schemas.ids import RouteId
from schemas.money import Price

LEG = Leg(RouteId("r"), "m", Price())


class Router:
    def __init__(self, p95_us: int | None) -> None:
        self._p95_us = p95_us

    def p95_ttft_us(self, _: Leg, *, stream: bool) -> int | None:
        assert stream
        return self._p95_us


def hedges(p95_us: int | None = None) -> Hedges:
    return Hedges(Router(p95_us), after_s=2.0)  # type: ignore[arg-type]


def test_a_route_may_be_silent_for_its_own_p95_or_for_the_setting() -> None:
    assert hedges(250_000).after_s(LEG) == 0.25
    assert hedges(None).after_s(LEG) == 2.0


def test_when_a_provider_is_slow_only_a_share_of_the_requests_has_a_second_attempt() -> None:
    """Else its slowness would double the work of all the others."""
    made = hedges()
    begun = 0
    for _ in range(10_000):
        made.after_s(LEG)
        begun += made.take()
    assert abs(begun - (SAVED_MAX + 10_000 * SHARE)) <= 2
