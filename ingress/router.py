"""Where requests go: what the fleet offers, the operator states and this ingress has seen itself, made into plans."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from bus.control import ControlFeed
from ingress.fleet import Fleet
from ingress.policy.routing import Leg, Plan, plan
from ingress.policy.waits import NOT_SAID
from ingress.trip import Seen, Trip
from schemas.chat import ChatRequest
from schemas.ids import WorkerId
from schemas.jobs import TimeLimits
from schemas.settings import RoutingSettings


class Router:
    """Makes the plans. *clock* counts monotonic seconds."""

    def __init__(
        self,
        fleet: Fleet,
        control: ControlFeed,
        settings: RoutingSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._control = control
        self._clock = clock
        self._seen = Seen(settings, clock=clock)

    def plan(self, request: ChatRequest) -> Plan:
        """Raises: NoLiveRoute, ModelNotFound."""
        return plan(
            request.model,
            offers=self._fleet.offers(request.model),
            stated=self._control.state.routes,
            known=self._fleet.knows(request.model),
            why_not=self._fleet.why_not,
        )

    def begin(self, leg: Leg, *, stream: bool) -> Trip:
        """An attempt at *leg* begins now. Whoever makes a trip ends it."""
        return Trip(self._seen, leg, stream=stream)

    def is_up(self, leg: Leg) -> bool:
        """Whether an attempt may begin at *leg*: not while it cools down, nor while another one probes it."""
        return self._seen.cooldowns.is_open(leg.route, leg.model, now=self._clock())

    def servers(self, leg: Leg) -> AbstractSet[WorkerId]:
        """The workers that serve *leg* now."""
        return self._fleet.servers(leg.route, leg.model)

    def timeouts(self, leg: Leg) -> TimeLimits:
        """What the operator states for *leg*'s route."""
        stated = self._control.state.routes.get(leg.route)
        return NOT_SAID if stated is None else stated.timeouts

    def p95_ttft_us(self, leg: Leg, *, stream: bool) -> int | None:
        """How long 95 of 100 first chunks take to come from *leg* at most; None while too few have come.

        Without streaming the first chunk is the whole answer.
        """
        return self._seen.measured.p95_ttft(leg.route, leg.model, stream=stream, now=self._clock())
