"""How fast each place has been of late, as this ingress saw it, and how much it was used: folded from its own attempts."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from ingress.policy.fading import Fading
from schemas.ids import RouteId

PLACES_MAX = 4096  # (route, model, stream or not) that are remembered; the one that was noted longest ago goes first

HALF_LIFE_S = 60.0  # of what `fastest` goes by
KNOWN_WEIGHT = 0.1  # less than this is left of its answers, and a place counts as unknown: 200 s after a single one

EXPLORE_EVERY_S = 30.0  # to find out how fast an unknown place is

P95_HALF_LIFE_S = 600.0
P95_ANSWERS_MIN = 20  # with fewer, a percentile says nothing
BUCKET_RATIO = 1.15  # a percentile is too high by this at most
BUCKET_FLOOR_US = 1000.0
BUCKETS = math.ceil(math.log(1e6) / math.log(BUCKET_RATIO))  # up to a thousand seconds

SLICE_S = 10.0
SLICES = 6  # the last minute

SECOND_US = 1e6

_WEIGHT, _FIRST_US, _TOKENS, _TOKENS_US = range(4)


@dataclass(frozen=True, slots=True)
class Speed:
    """*tokens_per_s* is infinite where no stream had a second token. Of whole answers both count the wait, too."""

    first_token_us: float  # of a *whole* answer: all of it
    tokens_per_s: float
    whole: bool = False


class Measured:
    """The speeds of all places, of streams and whole answers each; of a whole answer the first chunk is all of it.

    Times are monotonic seconds, spans microseconds.
    """

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[RouteId, str, bool], _Place] = OrderedDict()

    def note(
        self, route: RouteId, model: str, *, stream: bool, ttft_us: int, tokens: int, duration_us: int, now: float
    ) -> None:
        """An attempt has answered: its first chunk came after *ttft_us*, and the whole took *duration_us*."""
        key = (route, model, stream)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _Place(now, whole=not stream)
            if len(self._places) > PLACES_MAX:
                self._places.popitem(last=False)
        self._places.move_to_end(key)
        place.note(ttft_us, tokens, duration_us, now)

    def speed(self, route: RouteId, model: str, *, stream: bool, now: float) -> Speed | None:
        """None where there is no answer that is recent enough."""
        place = self._places.get((route, model, stream))
        return None if place is None else place.speed(now)

    def p95_ttft(self, route: RouteId, model: str, *, stream: bool, now: float) -> int | None:
        """How long 95 of 100 answers' first chunk takes at most, in microseconds; None while too few are known."""
        place = self._places.get((route, model, stream))
        return None if place is None else place.p95(now)


class _Place:
    __slots__ = ("_firsts", "_sums", "_whole")

    def __init__(self, now: float, *, whole: bool) -> None:
        self._whole = whole
        self._sums = Fading(4, half_life_s=HALF_LIFE_S, now=now)
        self._firsts = Fading(BUCKETS, half_life_s=P95_HALF_LIFE_S, now=now)

    def note(self, ttft_us: int, tokens: int, duration_us: int, now: float) -> None:
        self._sums.add(_WEIGHT, 1.0, now=now)
        self._sums.add(_FIRST_US, ttft_us, now=now)
        after_us = duration_us if self._whole else duration_us - ttft_us
        if tokens > 1 and after_us > 0:
            self._sums.add(_TOKENS, tokens if self._whole else tokens - 1, now=now)
            self._sums.add(_TOKENS_US, after_us, now=now)
        self._firsts.add(_bucket(ttft_us), 1.0, now=now)

    def speed(self, now: float) -> Speed | None:
        weight, first_us, tokens, tokens_us = self._sums.all(now=now)
        if weight < KNOWN_WEIGHT:
            return None
        return Speed(first_us / weight, tokens / tokens_us * SECOND_US if tokens_us else math.inf, self._whole)

    def p95(self, now: float) -> int | None:
        counts = self._firsts.all(now=now)
        total = sum(counts)
        if total < P95_ANSWERS_MIN:
            return None
        beyond = total * 0.05
        for index in range(BUCKETS - 1, -1, -1):
            beyond -= counts[index]
            if beyond < 0:
                return round(BUCKET_FLOOR_US * BUCKET_RATIO ** (index + 1))
        return round(BUCKET_FLOOR_US)


def _bucket(us: float) -> int:
    if us <= BUCKET_FLOOR_US:
        return 0
    return min(BUCKETS - 1, int(math.log(us / BUCKET_FLOOR_US) / math.log(BUCKET_RATIO)))


class Exploration:
    """When a place that nobody knows the speed of was last tried to find out. Asking is trying."""

    def __init__(self) -> None:
        self._tried: OrderedDict[tuple[RouteId, str], float] = OrderedDict()

    def due(self, route: RouteId, model: str, *, now: float) -> bool:
        place = (route, model)
        if now - self._tried.get(place, -math.inf) < EXPLORE_EVERY_S:
            return False
        self._tried[place] = now
        self._tried.move_to_end(place)
        if len(self._tried) > PLACES_MAX:
            self._tried.popitem(last=False)
        return True


class LastMinute:
    """Tokens of each route in the last minute, in slices of ten seconds."""

    def __init__(self) -> None:
        self._slices: OrderedDict[int, dict[RouteId, int]] = OrderedDict()

    def add(self, route: RouteId, tokens: int, *, now: float) -> None:
        number = int(now // SLICE_S)
        slice_ = self._slices.setdefault(number, {})
        slice_[route] = slice_.get(route, 0) + tokens
        while len(self._slices) > SLICES:
            self._slices.popitem(last=False)

    def tokens(self, route: RouteId, *, now: float) -> int:
        oldest = int(now // SLICE_S) - SLICES
        return sum(used.get(route, 0) for number, used in self._slices.items() if number > oldest)
