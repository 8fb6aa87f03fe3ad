"""Until when a provider is waited for."""

from __future__ import annotations

from collections.abc import Callable

from schemas.errors import ProviderTimeout
from schemas.jobs import Timeouts
from schemas.settings import WorkerSettings

BEHIND_S = 2.0  # the ingress keeps a request's time-outs, and names them; a worker that hears nothing of it stops so much later


class Patience:
    """First for the first chunk, then for each next one, and in all. ``until_s`` is by *clock*, monotonic seconds."""

    def __init__(self, *, first_s: float, idle_s: float, total_s: float, clock: Callable[[], float]) -> None:
        self._first_s, self._idle_s, self._total_s = first_s, idle_s, total_s
        self._clock = clock
        self._begun = False
        start_s = clock()
        self._total_until_s = start_s + total_s
        self.until_s = min(start_s + first_s, self._total_until_s)

    @classmethod
    def with_job(cls, timeouts: Timeouts, settings: WorkerSettings, *, clock: Callable[[], float]) -> Patience:
        """The worker's limits, and `BEHIND_S` behind the ingress the request's: the smaller one counts."""
        return cls(
            first_s=min(settings.first_byte_timeout_s, timeouts.first_token_s + BEHIND_S),
            idle_s=min(settings.idle_timeout_s, timeouts.idle_s + BEHIND_S),
            total_s=timeouts.total_s + BEHIND_S,
            clock=clock,
        )

    def renew(self) -> None:
        """Something came. Comments and keep-alives are not something."""
        self._begun = True
        self.until_s = min(self._clock() + self._idle_s, self._total_until_s)

    def fault(self) -> ProviderTimeout:
        """What it means that ``until_s`` is over."""
        if self.until_s >= self._total_until_s:
            return ProviderTimeout(f"The provider did not finish within {self._total_s:g} s.")
        if self._begun:
            return ProviderTimeout(f"The provider sent nothing for {self._idle_s:g} s in the middle of its answer.")
        return ProviderTimeout(f"The provider did not begin to answer within {self._first_s:g} s.")
