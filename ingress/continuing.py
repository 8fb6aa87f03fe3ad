"""Who goes on with an answer that broke off behind its first token: a decision from what was delivered and who is there.

Source: docs/adr/0066-continuation.md
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec
from msgspec import Raw

from ingress.delivered import Delivered
from ingress.fleet import Fleet, Serving
from ingress.policy.routing import Leg
from ingress.sse import usage_json
from schemas.errors import (
    FrameGap,
    IdleTimeout,
    NotContinued,
    PenstockError,
    ProviderFailed,
    ProviderNonsense,
    ProviderTimeout,
    ProviderUnreachable,
    QueueTimeout,
    WorkerLost,
)
from schemas.frames import Finished
from schemas.ids import WorkerId
from schemas.jobs import Continuation, Continues, ModelOffer
from schemas.money import Usage

MIGRATIONS_MAX = 2  # of one answer: what brings down three workers may well be the request
ASKED_MAX = 16  # times that somebody is asked to go on with one answer
LOOK_AGAIN_S = 0.05
DECLINED_S = 0.3  # a worker without room is not asked again

# What says something of the place and not of the request.
MOVABLE = (
    WorkerLost,
    FrameGap,
    IdleTimeout,
    QueueTimeout,
    ProviderFailed,
    ProviderNonsense,
    ProviderTimeout,
    ProviderUnreachable,
    NotContinued,
)


@dataclass(frozen=True, slots=True)
class Onward:
    """Where an answer goes on, and behind what."""

    leg: Leg
    worker: WorkerId
    exact: bool
    continuation: Continuation


class Continuing:
    """Of one request. *legs* are the places that its plan allows. *clock* counts monotonic seconds."""

    def __init__(
        self, delivered: Delivered, legs: Sequence[Leg], *, fleet: Fleet, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.delivered = delivered
        self.migrations = 0
        self._legs = legs
        self._fleet = fleet
        self._clock = clock
        self._failed: set[WorkerId] = set()
        self._declined: dict[WorkerId, float] = {}  # and when
        self._asked = 0
        self._origin: ModelOffer | None = None  # of the worker that began the answer

    def begun(self, leg: Leg, worker: WorkerId) -> None:
        """*worker* has begun the answer at *leg*. What it is is asked now, because it may be gone when it matters."""
        if self._origin is None:
            self._origin = self._fleet.offer(leg.model, worker=worker, route=leg.route)

    def failed(self, worker: WorkerId | None) -> None:
        if worker is not None:
            self._failed.add(worker)

    def declined(self, worker: WorkerId | None) -> None:
        """*worker* has no room at the moment."""
        if worker is not None:
            self._declined[worker] = self._clock()

    def may_move(self, leg: Leg, *, away_from: WorkerId | None) -> bool:
        """Whether somebody could go on if the attempt at *leg* were given up now."""
        there = self._candidates(leg)
        return any(each.worker != away_from for each, _ in there) and self._refused() is None

    def may_wait(self, error: PenstockError) -> bool:
        """Whether somebody may come who can go on: a worker like the one that began, when that comes back."""
        origin = self._origin
        able = origin is not None and origin.continues is not Continues.NO
        return able and isinstance(error, MOVABLE) and self._asked < ASKED_MAX and self._refused() is None

    def next(self, leg: Leg, error: PenstockError) -> Onward | None:
        """Who goes on after the attempt at *leg* ended with *error*; None if nobody may or can."""
        if not isinstance(error, MOVABLE) or self._asked >= ASKED_MAX or self._refused() is not None:
            return None
        found = self._candidates(leg)
        if not found:
            return None
        self._asked += 1
        there, exact = found[0]
        place = replace(leg, route=there.route)  # its client pays what it would have paid
        return Onward(place, there.worker, exact=exact, continuation=self.delivered.continuation(exact=exact))

    async def await_next(
        self, leg: Leg, error: PenstockError, *, until: float, gone: Callable[[], bool]
    ) -> Onward | None:
        """`next`; if nobody is there, whoever comes *until* then, and before the client is *gone*."""
        while (onward := self.next(leg, error)) is None:
            if gone() or self._clock() > until or not self.may_wait(error):
                return None
            await asyncio.sleep(LOOK_AGAIN_S)
        return onward

    def whole(self, frame: Finished, onward: Onward, *, tokens: int) -> Finished:
        """*frame* with the usage of the whole answer: its own is the last part's, which had *tokens* by its worker's count.

        The last part's prompt held what had been delivered, which is no part of what the client asked.
        """
        usage, before = frame.usage, onward.continuation.tokens
        if usage is None:
            return frame
        whole = Usage(
            prompt_tokens=self.delivered.prompt_tokens or max(1, usage.prompt_tokens - before),
            completion_tokens=before + (tokens if onward.exact else usage.completion_tokens),
            reasoning_tokens=usage.reasoning_tokens,
        )
        return msgspec.structs.replace(frame, usage=whole, usage_raw=Raw(usage_json(whole)))

    def _refused(self) -> str | None:
        if self.migrations >= MIGRATIONS_MAX:
            return "it has moved often enough"
        return self.delivered.why_not()

    def _candidates(self, leg: Leg) -> list[tuple[Serving, bool]]:
        """The workers that can go on, and whether exactly; the best first."""
        routes = {each.route for each in self._legs if each.model == leg.model}
        found = [
            (there, self._is_exact(there))
            for there in self._fleet.serving(leg.model)
            if there.route in routes and self._is_asked(there.worker) and self._can(there)
        ]
        return sorted(found, key=lambda each: (not each[1], -each[0].free))

    def _is_asked(self, worker: WorkerId) -> bool:
        declined_at = self._declined.get(worker)
        rested = declined_at is None or self._clock() - declined_at > DECLINED_S
        return rested and worker not in self._failed

    def _can(self, there: Serving) -> bool:
        """Not another model, tokenizer or quantisation, as far as that is known."""
        ours = None if self._origin is None else self._origin.fingerprint
        theirs = there.offer.fingerprint
        if ours is not None and theirs is not None and ours != theirs:
            return False
        return there.offer.continues is not Continues.NO

    def _is_exact(self, there: Serving) -> bool:
        ours = None if self._origin is None else self._origin.fingerprint
        same = ours is not None and there.offer.fingerprint == ours
        return same and there.offer.continues is Continues.EXACT and self.delivered.has_ids
