"""What a request has tried, and where it goes on when nothing of an answer has been delivered yet: a pure decision.

How far an error reaches says who else could do better:

    WORKER     another worker of the same route, and any other route
    ROUTE      any other route: the account or the whole pool is the matter
    MODEL      only another model, where the client named one: it is the request that is rejected
    REQUEST    nobody; the error is the answer

Source: docs/adr/0063-failover.md
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import IntEnum

from ingress.policy.routing import Leg, Plan
from schemas import errors
from schemas.errors import PenstockError, ProviderRejected, WorkerLost, WorkerYielded
from schemas.events import HEDGE_LOST
from schemas.ids import WorkerId

ATTEMPTS_MAX = 12  # of one request
LOST_MAX = 3  # workers that one request may lose: it may be the request that brings them down
TRIES_PER_LEG_MAX = 2  # with another worker each; a lost worker's are not counted

Workers = Callable[[Leg], AbstractSet[WorkerId]]


class Reach(IntEnum):
    WORKER = 1
    ROUTE = 2
    MODEL = 3
    REQUEST = 4


_REACH: dict[type[PenstockError], Reach] = {
    errors.WorkerLost: Reach.WORKER,
    errors.FrameGap: Reach.WORKER,
    errors.FirstTokenTimeout: Reach.WORKER,
    errors.IdleTimeout: Reach.WORKER,
    errors.ProviderUnreachable: Reach.WORKER,
    errors.ProviderTimeout: Reach.WORKER,
    errors.ProviderFailed: Reach.WORKER,
    errors.ProviderNonsense: Reach.WORKER,
    errors.Fault: Reach.ROUTE,
    errors.QueueTimeout: Reach.ROUTE,
    errors.TotalTimeout: Reach.ROUTE,  # the route's; the request's own is no attempt's error
    errors.BacklogFull: Reach.ROUTE,
    errors.NoLiveRoute: Reach.ROUTE,
    errors.ProviderRejected: Reach.MODEL,
    errors.PenstockError: Reach.REQUEST,
}

# Rejections that say something of the place and not of the request: another one with the same model may take it.
PLACE_STATUSES = frozenset({404, 413})
PLACE_CODES = frozenset(
    {
        "context_length_exceeded",
        "model_not_found",
        "unknown_parameter",
        "unsupported_parameter",
        "unsupported_value",
    }
)

_TOKEN = re.compile(r"[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*")


def reach(error: PenstockError) -> Reach:
    if isinstance(error, ProviderRejected) and (error.status in PLACE_STATUSES or error.upstream_code in PLACE_CODES):
        return Reach.ROUTE
    return next(_REACH[cls] for cls in type(error).__mro__ if cls in _REACH)


@dataclass(frozen=True, slots=True)
class Try:
    """An attempt that came to nothing."""

    leg: Leg
    worker: WorkerId | None
    reach: Reach
    code: str
    status: int | None  # the provider's, if it gave one
    lost: bool

    @property
    def downed(self) -> bool:
        """Whether its worker may have been brought down by it: one that hands back was not."""
        return self.lost and self.code != WorkerYielded.code

    @property
    def place(self) -> tuple[str, str]:
        return _place(self.leg)


class Trail:
    """Of one request. *workers* tells who serves a leg at the moment, *is_up* whether it is not left alone after faults."""

    def __init__(self, plan: Plan, *, workers: Workers, is_up: Callable[[Leg], bool]) -> None:
        self.tries: list[Try] = []
        self._plan = plan
        self._workers = workers
        self._is_up = is_up
        self._begun: list[tuple[str, str]] = []

    def first(self) -> Leg:
        """Where the first attempt goes: to the plan's first leg, unless another request has taken its probe meanwhile."""
        return next((leg for leg in self._plan.legs if self._is_up(leg)), self._plan.legs[0])

    def begin(self, leg: Leg) -> None:
        self._begun.append(_place(leg))

    def failed(self, leg: Leg, worker: WorkerId | None, error: PenstockError) -> None:
        self.tries.append(
            Try(
                leg,
                worker,
                reach=reach(error),
                code=error.code,
                status=getattr(error, "status", None),
                lost=isinstance(error, WorkerLost),
            )
        )

    def outrun(self, leg: Leg, worker: WorkerId | None) -> None:
        """Another attempt spoke before the one at *leg*."""
        self.tries.append(Try(leg, worker, Reach.ROUTE, HEDGE_LOST, status=None, lost=False))

    def next(self) -> Leg | None:
        """Where the next attempt goes after the last one has failed; None if there shall be none."""
        if not self.tries or self.tries[-1].reach is Reach.REQUEST:
            return None
        if len(self._begun) >= ATTEMPTS_MAX or sum(each.downed for each in self.tries) >= LOST_MAX:
            return None
        legs = self._open()
        fresh = sorted(self._fresh(), key=lambda leg: not self._is_up(leg))
        again = [leg for leg in legs if self._helps_again(leg)]
        waiting = [leg for leg in legs if self._was_lost(leg)]  # in the queue, for a worker that comes back
        return next(iter((*fresh, *again, *waiting)), None)

    def beside(self, leg: Leg) -> Leg | None:
        """Where a second attempt may race with one at *leg*: the next other route with the same model; None without one."""
        others = (other for other in self._fresh() if other.model == leg.model and other.route != leg.route)
        return next((other for other in others if self._is_up(other)), None)

    def not_workers(self, leg: Leg) -> tuple[WorkerId, ...]:
        """Who shall not take an attempt at *leg*: those that failed, as long as there is somebody else."""
        if not self.tries:
            return ()
        failed = self._failed_at(leg)
        return tuple(sorted(failed)) if self._workers(leg) - failed else ()

    def elsewhere(self, leg: Leg) -> bool:
        """Whether *leg* has nobody left to serve it while another leg that was not tried yet has."""
        return not self._workers(leg) and bool(self._fresh())

    def told(self) -> str:
        """All that came to nothing, for a header: ``openai;code=upstream_rate_limited;status=429, local;code=queue_timeout``."""
        return ", ".join(_told(each) for each in self.tries)

    def _open(self) -> list[Leg]:
        refused = {each.leg.model for each in self.tries if each.reach is Reach.MODEL}
        return [leg for leg in self._plan.legs if leg.model not in refused]

    def _fresh(self) -> list[Leg]:
        """The legs that were not tried yet and that somebody serves."""
        return [leg for leg in self._open() if _place(leg) not in self._begun and self._workers(leg)]

    def _helps_again(self, leg: Leg) -> bool:
        """Whether another worker than those that failed at *leg* could do it."""
        here = [each for each in self.tries if each.place == _place(leg)]
        if not here or any(each.reach is not Reach.WORKER for each in here):
            return False
        faults = sum(not each.lost for each in here)
        return faults < TRIES_PER_LEG_MAX and bool(self._workers(leg) - self._failed_at(leg))

    def _was_lost(self, leg: Leg) -> bool:
        here = [each for each in self.tries if each.place == _place(leg)]
        return bool(here) and all(each.lost for each in here)

    def _failed_at(self, leg: Leg) -> AbstractSet[WorkerId]:
        return {
            each.worker
            for each in self.tries
            if each.worker is not None and (each.lost or (each.leg.route == leg.route and each.reach is Reach.WORKER))
        }


def _place(leg: Leg) -> tuple[str, str]:
    return leg.route, leg.model


def _told(each: Try) -> str:
    route = str(each.leg.route)
    if not _TOKEN.fullmatch(route):
        plain = "".join(c if " " <= c <= "~" else "?" for c in route)
        route = '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
    status = f";status={each.status}" if each.status is not None else ""
    return f"{route};code={each.code}{status}"
