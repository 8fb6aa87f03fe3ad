"""Whether a provider is well, from how its last answers were; pure, the clock and the dice are passed in.

It is taken down when most of its lately weighed tries failed, or when its streams begin too late; from then on it is probed,
and one probe that is answered brings it back. Times are monotonic seconds.
Source: docs/adr/0053-health.md
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from schemas import standing

Dice = Callable[[], float]  # from 0 to 1

LATENCIES_MAX = 51  # streams whose first tokens are remembered
LATENCIES_MIN = 5  # before their median means anything


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthRules:
    half_life_s: float = 60.0  # a try counts half as much after this
    failures_min: float = 8.0  # fewer, so weighed, take no route down
    error_rate_max: float = 0.5
    probe_first_s: float = 1.0
    probe_max_s: float = 30.0


class Health:
    """*first_token_max_s* is how late its streams may begin, by their median; 0 is for ever."""

    def __init__(self, rules: HealthRules, *, first_token_max_s: float = 0.0, dice: Dice) -> None:
        self._rules = rules
        self._first_token_max_s = first_token_max_s
        self._dice = dice
        self._well = 0.0
        self._failed = 0.0
        self._weighed_at = 0.0
        self._first_tokens: deque[float] = deque(maxlen=LATENCIES_MAX)
        self._backoff: Backoff | None = None
        self.down: str | None = None  # why, if it is

    @property
    def probe_at(self) -> float | None:
        """When it is to be asked again; None if it is well."""
        return None if self._backoff is None else self._backoff.at

    def answered(self, now: float, *, first_token_s: float | None = None) -> None:
        """A try went well; *first_token_s* is how long its stream took to begin."""
        self._weigh(now)
        self._well += 1
        if first_token_s is not None:
            self._first_tokens.append(first_token_s)
            self._judge_latency(now)

    def failed(self, now: float, why: str) -> None:
        """A try failed, and it was the provider's fault."""
        self._weigh(now)
        self._failed += 1
        if self._failed >= self._rules.failures_min and self.error_rate(now) >= self._rules.error_rate_max:
            self._take_down(now, why)

    def probed(self, now: float, *, answer_s: float | None) -> None:
        """A probe was answered after *answer_s*, or wasn't."""
        if self._backoff is None:
            return
        if answer_s is None or (self._first_token_max_s and answer_s > self._first_token_max_s):
            self._backoff.again(now)
            return
        self._backoff = self.down = None
        self._well = self._failed = 0.0
        self._first_tokens.clear()

    def error_rate(self, now: float) -> float:
        self._weigh(now)
        tries = self._well + self._failed
        return self._failed / tries if tries else 0.0

    def told(self, now: float) -> standing.Health:
        first_token_ms = round(1000 * median(self._first_tokens)) if self._first_tokens else None
        return standing.Health(error_rate=round(self.error_rate(now), 3), first_token_ms=first_token_ms)

    def _judge_latency(self, now: float) -> None:
        if not self._first_token_max_s or len(self._first_tokens) < LATENCIES_MIN:
            return
        typical_s = median(self._first_tokens)
        if typical_s > self._first_token_max_s:
            self._take_down(
                now, f"it begins to answer after {typical_s:.1f} s; {self._first_token_max_s:g} s are allowed"
            )

    def _take_down(self, now: float, why: str) -> None:
        if self.down is None:
            self.down = why
            self._backoff = Backoff(
                now, first_s=self._rules.probe_first_s, max_s=self._rules.probe_max_s, dice=self._dice
            )

    def _weigh(self, now: float) -> None:
        """What was counted so far weighs less by now."""
        factor = 0.5 ** ((now - self._weighed_at) / self._rules.half_life_s)
        self._well *= factor
        self._failed *= factor
        self._weighed_at = now


class Backoff:
    """When something is to be tried again: after *first_s*, then twice as long each time up to *max_s*, each a bit at random."""

    def __init__(self, now: float, *, first_s: float, max_s: float, dice: Dice) -> None:
        self._wait_s = first_s
        self._max_s = max_s
        self._dice = dice
        self.at = now + self._jittered()

    def again(self, now: float) -> None:
        self._wait_s = min(2 * self._wait_s, self._max_s)
        self.at = now + self._jittered()

    def at_once(self, now: float) -> None:
        self.at = now

    def _jittered(self) -> float:
        return self._wait_s * (0.75 + 0.5 * self._dice())
