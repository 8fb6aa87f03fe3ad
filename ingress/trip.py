"""One attempt at a leg as the router sees it, and what this ingress has learnt from all of them."""

from __future__ import annotations

from collections.abc import Callable

from ingress.fleet import Load
from ingress.policy.cooldown import Cooldowns
from ingress.policy.measured import Exploration, LastMinute, Measured
from ingress.policy.routing import Leg
from schemas.errors import (
    Fault,
    FirstTokenTimeout,
    IdleTimeout,
    NotContinued,
    PenstockError,
    ProviderAuth,
    ProviderRateLimited,
    ProviderRejected,
    ProviderUnreachable,
    QueueTimeout,
)
from schemas.ids import RouteId
from schemas.settings import RoutingSettings

SECOND_US = 1e6
NO_SUCH_MODEL = 404

_OF_THE_PLACE = (Fault, QueueTimeout, FirstTokenTimeout, IdleTimeout)
_SURE = (ProviderAuth, ProviderRateLimited, ProviderUnreachable)  # the next attempt would end the same way


class Seen:
    """What the attempts of this ingress have shown. *clock* counts monotonic seconds."""

    def __init__(
        self, settings: RoutingSettings, load: Callable[[RouteId], Load], *, clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        self.load = load
        self.measured = Measured()
        self.exploration = Exploration()
        self.last_minute = LastMinute()
        self.cooldowns = Cooldowns(first_s=settings.cooldown_s, longest_s=settings.cooldown_max_s)

    def is_open(self, route: RouteId, model: str, *, now: float) -> bool:
        """Whether an attempt may begin there: it doesn't cool down, nobody probes it, and its jobs needn't wait for its limits."""
        return self.cooldowns.is_open(route, model, now=now) and not self.load(route).is_held


class Trip:
    """It begins when it is made, perhaps speaks, perhaps fails, and ends."""

    __slots__ = ("_began_at", "_failed", "_over", "_pass", "_seen", "_spoke_at", "_stream", "leg")

    def __init__(self, seen: Seen, leg: Leg, *, stream: bool) -> None:
        self.leg = leg
        self._seen = seen
        self._stream = stream
        self._began_at = seen.clock()
        self._spoke_at: float | None = None
        self._failed = False
        self._over = False
        self._pass = seen.cooldowns.begin(leg.route, leg.model, now=self._began_at)
        self._load(1)

    @property
    def is_probe(self) -> bool:
        """Whether it decides if its place comes back after a cool-down."""
        return self._pass.probe

    def spoke(self) -> None:
        """Its first chunk came."""
        if self._spoke_at is None and not self._over:
            self._spoke_at = now = self._seen.clock()
            self._seen.cooldowns.answered(self.leg.route, self.leg.model, self._pass, now=now)

    def failed(self, error: PenstockError) -> None:
        """It ended with *error*. What isn't its place's fault (a bad request, a lost machine) counts for nothing."""
        if _is_of_the_place(error) and not self._over:
            self._failed = True
            self._seen.cooldowns.failed(
                self.leg.route,
                self.leg.model,
                self._pass,
                now=self._seen.clock(),
                why=error.code,
                sure=isinstance(error, _SURE),
                wait_s=error.retry_after_s if isinstance(error, Fault) else None,
            )

    def ended(self, tokens: int) -> None:
        """It is over, however it went, with so many completion *tokens*. Only the first call counts."""
        if self._over:
            return
        self._over = True
        self._load(-1)
        now, leg = self._seen.clock(), self.leg
        self._seen.cooldowns.dropped(leg.route, leg.model, self._pass)
        if self._spoke_at is not None:
            if not self._failed:
                self._seen.cooldowns.went_well(leg.route, leg.model)
            self._seen.last_minute.add(leg.route, tokens, now=now)
            self._seen.measured.note(
                leg.route,
                leg.model,
                stream=self._stream,
                ttft_us=int((self._spoke_at - self._began_at) * SECOND_US),
                tokens=tokens,
                duration_us=int((now - self._began_at) * SECOND_US),
                now=now,
            )

    def _load(self, more: int) -> None:
        load = self._seen.load(self.leg.route)
        load.running += more
        load.begun += more


def _is_of_the_place(error: PenstockError) -> bool:
    """Whether *error* says something of its place.

    That the provider rejects a request doesn't, unless it has no such model; nor that it can't go on with another's answer.
    """
    if isinstance(error, ProviderRejected):
        return error.status == NO_SUCH_MODEL
    return isinstance(error, _OF_THE_PLACE) and not isinstance(error, NotContinued)
