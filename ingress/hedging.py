"""When a second attempt begins beside one that says nothing, and how many there may be.

Source: docs/adr/0065-hedging.md
"""

from __future__ import annotations

from ingress.policy.routing import Leg
from ingress.router import Router

SHARE = 0.1  # of all requests that may have a second attempt: a slow provider must not double the work of the others
SAVED_MAX = 10.0  # second attempts that may begin at once

SECOND_US = 1e6


class Hedges:
    """Of one ingress. *after_s* holds for a route that has not answered often enough for its own figure."""

    def __init__(self, router: Router, *, after_s: float) -> None:
        self._router = router
        self._after_s = after_s
        self._saved = SAVED_MAX

    def after_s(self, leg: Leg) -> float:
        """How long *leg* may be silent: as long as 19 of 20 of its first tokens take at most."""
        self._saved = min(SAVED_MAX, self._saved + SHARE)
        p95_us = self._router.p95_ttft_us(leg, stream=True)
        return self._after_s if p95_us is None else p95_us / SECOND_US

    def take(self) -> bool:
        """Whether one may begin now."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
