"""Jobs that wait at a worker itself for a slot, before all that wait in the queue: their clients are in the middle of an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from schemas.ids import Nonce, RouteId
from schemas.jobs import Job

STANDBY_MAX = 64  # jobs of one route; whoever asks has asked others, too


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: Job
    until: float


class Standby:
    """*clock* counts seconds. Whose request is the oldest comes first, whenever it came."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: dict[RouteId, dict[Nonce, _Waiting]] = {}

    def join(self, job: Job, *, for_s: float) -> None:
        """*job* waits at its route, if there is room."""
        self._tidy(job.route)
        here = self._waiting.setdefault(job.route, {})
        if len(here) < STANDBY_MAX:
            here[job.nonce] = _Waiting(job, self._clock() + for_s)

    def leave(self, nonce: Nonce) -> None:
        """Nobody wants it here any more."""
        for here in self._waiting.values():
            here.pop(nonce, None)

    def take(self, route: RouteId) -> Job | None:
        """The next one at *route*, which stands by no more."""
        self._tidy(route)
        here = self._waiting.get(route)
        if not here:
            return None
        job = min((waiting.job for waiting in here.values()), key=lambda each: each.accepted_ns)
        del here[job.nonce]
        return job

    def _tidy(self, route: RouteId) -> None:
        now = self._clock()
        here = self._waiting.get(route, {})
        for nonce in [nonce for nonce, waiting in here.items() if waiting.until <= now]:
            del here[nonce]
