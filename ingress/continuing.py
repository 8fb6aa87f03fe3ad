"""Who goes on with an answer that broke off behind its first token: a decision from what was delivered and who is there.

Source: docs/adr/0066-continuation.md, docs/adr/0077-who-is-waited-for.md
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
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
DECLINED_MAX = 3  # workers without room that are found out by asking: presence may be 2 s old
STANDBY_MAX = 32  # workers at which one answer waits for a slot
LOOK_AGAIN_S = 0.05
DECLINED_S = 0.3  # a worker without room is not asked again
TOLD_WITHIN_S = 0.5  # after a loss: in which presence tells what has become of whom
BACK_WITHIN_S = 5.0  # after a loss: in which whoever watches over a process has started it again
_NOT_FAILED = -1

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
    """Where an answer goes on, and behind what: at the first of *workers*, or if it *waits*, at the one that has a slot first."""

    leg: Leg
    workers: tuple[WorkerId, ...]
    exact: bool
    continuation: Continuation
    waits: bool = False


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
        self._failed: dict[WorkerId, int] = {}  # and when their processes began
        self._born_ns: dict[WorkerId, int] = {}
        self._declined: dict[WorkerId, float] = {}  # and when
        self._asked = 0
        self._beginner: tuple[Leg, WorkerId] | None = None  # who began the answer
        self._origin: ModelOffer | None = None  # what that worker offers

    def begun(self, leg: Leg, worker: WorkerId) -> None:
        """*worker* has begun the answer at *leg*. What it is is asked now, because it may be gone when it matters."""
        self._beginner = self._beginner or (leg, worker)
        self._look_for_origin()
        self._born_ns[worker] = self._fleet.born_ns(worker) or 0

    def _look_for_origin(self) -> None:
        """A worker may begin before its presence tells what it is: right after NATS was away."""
        if self._origin is None and self._beginner is not None:
            leg, worker = self._beginner
            self._origin = self._fleet.offer(leg.model, worker=worker, route=leg.route)

    def failed(self, worker: WorkerId | None) -> None:
        if worker is not None:
            self._failed[worker] = self._born_ns.get(worker) or self._fleet.born_ns(worker) or 0

    def declined(self, worker: WorkerId | None) -> None:
        """*worker* has no room at the moment."""
        if worker is not None:
            self._declined[worker] = self._clock()

    def may_move(self, leg: Leg, *, away_from: WorkerId | None) -> bool:
        """Whether somebody could go on at once if the attempt at *leg* were given up now."""
        there = self._candidates(leg)
        return any(each.worker != away_from and each.free > 0 for each, _ in there) and self._refused() is None

    def may_wait(self, error: PenstockError) -> bool:
        """Whether somebody may come who can go on: a worker like the one that began, when that comes back."""
        origin = self._origin
        able = origin is not None and origin.continues is not Continues.NO
        return able and isinstance(error, MOVABLE) and self._asked < ASKED_MAX and self._refused() is None

    def next(self, leg: Leg, error: PenstockError) -> Onward | None:
        """Who goes on after the attempt at *leg* ended with *error*; None if nobody may or can.

        One after the other is asked; when all are full, it waits at all of them for a slot.
        """
        if not isinstance(error, MOVABLE) or self._asked >= ASKED_MAX or self._refused() is not None:
            return None
        self._look_for_origin()
        found = self._candidates(leg)
        rested = [each for each in found if self._has_rested(each[0].worker)]
        standby = _standby_of(found)
        waits = bool(standby) and (not rested or len(self._declined) >= DECLINED_MAX)
        chosen = standby if waits else rested[:1]
        if not chosen:
            return None
        self._asked += 1
        there, exact = chosen[0]
        self._born_ns.update((each.worker, each.born_ns) for each, _ in chosen)
        place = replace(leg, route=there.route)  # its client pays what it would have paid
        workers = tuple(each.worker for each, _ in chosen)
        return Onward(place, workers, exact, self.delivered.continuation(exact=exact), waits=waits)

    def standby(self, onward: Onward) -> tuple[WorkerId, ...]:
        """All at whom *onward* may wait by now."""
        found = self._candidates(onward.leg)
        here = [(each, exact) for each, exact in found if each.route == onward.leg.route and exact is onward.exact]
        self._born_ns.update((each.worker, each.born_ns) for each, _ in here)
        return tuple(each.worker for each, _ in here if each.waits)

    async def await_next(
        self, leg: Leg, error: PenstockError, *, since: float, gone: Callable[[], bool]
    ) -> Onward | None:
        """`next`; if nobody is there, whoever may still come after the loss *since* then, before the client is *gone*."""
        while (onward := self.next(leg, error)) is None:
            if gone() or self._clock() > since + self._hope_s() or not self.may_wait(error):
                return None
            await asyncio.sleep(LOOK_AGAIN_S)
        return onward

    def _hope_s(self) -> float:
        """For how long after a loss somebody may come: a process that is gone is started again, mostly.

        One that lives and has failed is told of by its presence, and then nothing more is to be hoped for.
        """
        gone = any(self._fleet.born_ns(worker) is None for worker in self._failed)
        return BACK_WITHIN_S if gone or not self._failed else TOLD_WITHIN_S

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
            if there.route in routes
            and self._failed.get(there.worker, _NOT_FAILED) != there.born_ns
            and self._can(there)
        ]
        return sorted(found, key=lambda each: (not each[1], -each[0].free))

    def _has_rested(self, worker: WorkerId) -> bool:
        declined_at = self._declined.get(worker)
        return declined_at is None or self._clock() - declined_at > DECLINED_S

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


def _standby_of(found: Sequence[tuple[Serving, bool]]) -> list[tuple[Serving, bool]]:
    """Those of *found* at which one answer may wait: of one route, all exactly or none, and as many as there are."""
    able = [each for each in found if each[0].waits]
    best = [each for each in able if each[1] is able[0][1]]
    routes = Counter(there.route for there, _ in best)
    return [each for each in best if each[0].route == routes.most_common(1)[0][0]][:STANDBY_MAX]
