"""What is known at the moment in which a plan is made, for the strategies to ask; looked up only if they do."""

from __future__ import annotations

from collections.abc import Callable

from ingress.policy.measured import Speed
from ingress.policy.strategies import Candidate
from ingress.trip import Seen
from schemas.chat import ChatRequest
from schemas.ids import RouteId
from schemas.money import Usage, estimate

COMPLETION_GUESS = 500  # tokens of an answer, where the request doesn't ask for fewer


class Moment:
    """For one plan. It sends one request at most to find out how fast a place is."""

    def __init__(self, seen: Seen, request: ChatRequest, *, dice: Callable[[], float]) -> None:
        self.dice = dice
        self._seen = seen
        self._now = seen.clock()
        self._request = request
        self._stream = request.stream
        self._explored: tuple[RouteId, str] | None = None
        self._usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        """What the request will probably use; to compare prices, not to bill."""
        if self._usage is None:
            limit = self._request.max_output_tokens
            guess = COMPLETION_GUESS if limit is None else min(limit, COMPLETION_GUESS)
            prompt_bytes = len(memoryview(self._request.messages))
            self._usage = estimate(prompt_bytes=prompt_bytes, completion_tokens=guess)
        return self._usage

    def speed(self, candidate: Candidate) -> Speed | None:
        return self._seen.measured.speed(candidate.route, candidate.model, stream=self._stream, now=self._now)

    def explores(self, candidate: Candidate) -> bool:
        place = (candidate.route, candidate.model)
        if self._explored is None and self.is_open(*place) and self._seen.exploration.due(*place, now=self._now):
            self._explored = place
        return self._explored == place

    def slots(self, candidate: Candidate) -> tuple[int, int]:
        load = self._seen.load(candidate.route)
        return load.taken, load.slots

    def last_minute(self, candidate: Candidate) -> int:
        return self._seen.last_minute.tokens(candidate.route, now=self._now)

    def is_open(self, route: RouteId, model: str) -> bool:
        return self._seen.is_open(route, model, now=self._now)

    def why(self, route: RouteId, model: str) -> str:
        cooling = self._seen.cooldowns.why(route, model, now=self._now)
        load = self._seen.load(route)
        return cooling or (f"its jobs wait: {load.why_held}" if load.is_held else "")
