"""How much may be sent: by a route's own limits, and by what a provider's headers tell of a key's; pure, the clock is passed in.

Both answer one question: from when on is there room for so much? Times are monotonic seconds.
Source: docs/adr/0052-limits.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from schemas.jobs import Job
from workers.providers.rate_headers import Told

MINUTE_S = 60.0
SLOT_S = 0.5  # what is taken is counted by such a slot of time, which bounds the memory
SLACK_S = 0.25  # between our sending and the provider's counting
UNTOLD_RESET_S = 15.0  # where a provider tells what is left, and not until when
ANSWER_TOKENS = 256  # of an answer, before there was one
REMEMBERED_ANSWERS = 16
BYTES_PER_TOKEN = 4
LOOK_AGAIN_S = 0.25  # for the answers to what is under way, which will tell


class Window:
    """At most *limit* within any *span_s*; a limit of 0 is none."""

    def __init__(self, limit: int, *, span_s: float = MINUTE_S) -> None:
        self.limit = limit
        self._span_s = span_s
        self._taken: dict[int, int] = {}  # by slot, in their order
        self._sum = 0

    def used(self, now: float) -> int:
        self._drop(now)
        return self._sum

    def free_at(self, now: float, amount: int) -> float:
        """When *amount* may be taken: *now*, or later. More than the whole limit may be when nothing else is taken."""
        self._drop(now)
        over = self._sum + min(amount, self.limit) - self.limit
        if self.limit == 0 or over <= 0:
            return now
        for slot, taken in self._taken.items():
            over -= taken
            if over <= 0:
                return self._until(slot)
        return now

    def take(self, now: float, amount: int) -> int:
        """Takes *amount* now. Returns the slot, for `settle`."""
        slot = int(now / SLOT_S)
        self._taken[slot] = self._taken.get(slot, 0) + amount
        self._sum += amount
        return slot

    def settle(self, slot: int, difference: int) -> None:
        """What was taken in *slot* turned out to be so much more, or less."""
        before = self._taken.get(slot)
        if before is not None:
            self._taken[slot] = max(0, before + difference)
            self._sum += self._taken[slot] - before

    def _drop(self, now: float) -> None:
        while self._taken and self._until(slot := next(iter(self._taken))) <= now:
            self._sum -= self._taken.pop(slot)

    def _until(self, slot: int) -> float:
        return (slot + 1) * SLOT_S + self._span_s + SLACK_S


@dataclass(slots=True)
class Allowance:
    """What a key may still send, in requests or in tokens, as its provider's headers tell; everything before they do.

    What was sent and not yet answered (*pending*) may or may not be in the provider's figure: it is taken off.
    """

    limit: int | None = None
    left: float = math.inf
    reset_at: float = math.inf
    span_s: float = 0.0
    pending: int = 0

    def free_at(self, now: float, amount: int) -> float:
        self._reset(now)
        wanted = amount if self.limit is None else min(amount, self.limit)
        if wanted <= self.left:
            return now
        if self.reset_at == math.inf:
            return now + LOOK_AGAIN_S
        wait_s = self.reset_at - now
        if wait_s > MINUTE_S and self.limit:  # a day's limit: it comes back bit by bit, not at once
            wait_s *= min(1.0, max(0.0, wanted - self.left) / max(1.0, self.limit - self.left))
        return now + wait_s

    def take(self, amount: int) -> None:
        self.left -= amount
        self.pending += amount

    def answered(self, amount: int) -> None:
        """What was taken is in the provider's figures now, or never came to it.

        Since the last reset no figure has come, and perhaps none will: then only what is under way is taken off.
        """
        self.pending -= amount
        if self.reset_at == math.inf:
            self.left += amount

    def told(self, now: float, told: Told) -> None:
        if told.limit is not None:
            self.limit = told.limit
        if told.left is None:
            return
        self.left = told.left - self.pending
        self.span_s = UNTOLD_RESET_S if told.reset_s is None else told.reset_s
        self.reset_at = now + self.span_s

    def _reset(self, now: float) -> None:
        """Its time is over: all is there again, less what is under way. The next answer tells more."""
        if now >= self.reset_at:
            self.left = math.inf if self.limit is None else self.limit - self.pending
            self.reset_at = math.inf


class _Bounds(Struct):
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_bounds = msgspec.json.Decoder(_Bounds).decode


class Expected:
    """How many tokens a job will probably take: its prompt by its size, its answer as answers were so far."""

    def __init__(self) -> None:
        self._typical = float(ANSWER_TOKENS)

    def tokens(self, job: Job) -> int:
        try:
            bounds = _bounds(job.body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # whatever the provider makes of it
            bounds = _Bounds()
        bound = bounds.max_completion_tokens or bounds.max_tokens or self._typical
        return prompt_tokens(job) + int(min(self._typical, max(1, bound)))

    def note(self, completion_tokens: int) -> None:
        self._typical += (completion_tokens - self._typical) / REMEMBERED_ANSWERS


def prompt_tokens(job: Job) -> int:
    """By its size, for a provider that doesn't count."""
    return len(bytes(job.body)) // BYTES_PER_TOKEN
