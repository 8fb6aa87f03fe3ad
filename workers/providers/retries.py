"""What a fault means for the next try, and how long one attempt goes on trying; pure.

============================  =====================  ==================  =============
the provider's answer         its key                the next try        after
============================  =====================  ==================  =============
429                           cools                  another key         a back-off, from the second one on
401, 402, 403                 dead                   another key         nothing
5xx, 408, no connection       keeps                  the same, or any    a back-off
400, 404, 409, 413, 422       keeps                  none                -
anything else                 keeps                  none                -
============================  =====================  ==================  =============

Nothing is tried again once a piece of the answer was handed on. Every back-off has jitter.
Source: docs/adr/0051-keys-of-a-route.md
"""

from __future__ import annotations

from enum import Enum, auto

from schemas.errors import (
    Fault,
    ProviderAuth,
    ProviderFailed,
    ProviderNonsense,
    ProviderRateLimited,
    ProviderTimeout,
    ProviderUnreachable,
)
from workers.providers.health import Dice

KEYS_MAX = 64  # of one route
TRIES_MAX = 128  # of one attempt, whatever ends them: each key may be refused once and limited once
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 5.0
OUT_OF_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})  # codes with a 429


class Verdict(Enum):
    """What a fault says of the key, and of trying again."""

    COOL = auto()  # the key rests; another one may do
    KILL = auto()  # the key is no good; another one may do
    RETRY = auto()  # it isn't the key; the same again may do
    FINAL = auto()  # it would only be said again


def verdict(fault: Fault) -> Verdict:
    match fault:
        case ProviderAuth():
            return Verdict.KILL
        case ProviderRateLimited():
            return Verdict.KILL if fault.upstream_code in OUT_OF_QUOTA else Verdict.COOL
        case ProviderUnreachable() | ProviderFailed(status=None):
            return Verdict.RETRY
        case ProviderFailed(status=int(status)) | ProviderTimeout(status=int(status)) if status >= 500 or status == 408:
            return Verdict.RETRY
        case _:
            return Verdict.FINAL


def is_unwell(fault: Fault, *, waited_s: float, patience_s: float) -> bool:
    """Whether a fault counts against the provider's health; a time-out only where it had *patience_s*."""
    if isinstance(fault, ProviderTimeout) and fault.status is None:
        return waited_s >= patience_s
    return isinstance(fault, ProviderUnreachable | ProviderTimeout | ProviderFailed | ProviderNonsense)


def dead_reason(fault: Fault) -> str:
    """Why a key is dead, without a word of the provider's."""
    if isinstance(fault, ProviderRateLimited):
        return f"no quota left (HTTP {fault.status or 429})"
    return f"refused (HTTP {fault.status})" if fault.status is not None else "refused"


class Tries:
    """The tries of one attempt: how many failed by whose fault, and until when it may go on. Times are monotonic seconds."""

    def __init__(self, now: float, *, until: float, keys: int, failures_max: int, dice: Dice) -> None:
        self.count = 0
        self.until = until
        self.began = now
        self.last: Fault | None = None
        self.waited_s = 0.0  # for a key or a limit
        self._failures_max = failures_max
        self._limited_max = keys + failures_max - 1  # each key once, and one of them as often as a failure
        self._dice = dice
        self._failures = 0
        self._limited = 0

    def pause_s(self, found: Verdict) -> float | None:
        """How long to wait before the next try; None if there is to be none."""
        if found is Verdict.FINAL or self.count >= TRIES_MAX:
            return None
        if found is Verdict.RETRY:
            self._failures += 1
            return None if self._failures >= self._failures_max else self._backoff(self._failures)
        if found is Verdict.COOL:  # the first time at once: another key may well have room
            self._limited += 1
            if self._limited >= self._limited_max:
                return None
            return 0.0 if self._limited == 1 else self._backoff(self._limited - 1)
        return 0.0

    def _backoff(self, number: int) -> float:
        return min(BACKOFF_FIRST_S * 2.0 ** (number - 1), BACKOFF_MAX_S) * (0.5 + self._dice())
