"""Sums in which the past counts for less and less: what is old is forgotten without anybody deleting it."""

from __future__ import annotations

import math
from array import array

RESCALE_AT = 64.0  # half-lives between two rescalings: the weights are powers of two, and doubles go to 2**1023


class Fading:
    """*size* sums; what was added counts half as much after every *half_life_s*.

    New amounts are weighed up instead of old ones down, so that adding touches one number. *now* is monotonic seconds.
    """

    def __init__(self, size: int, *, half_life_s: float, now: float) -> None:
        self._sums = array("d", bytes(8 * size))
        self._half_life_s = half_life_s
        self._since = now

    def add(self, index: int, amount: float, *, now: float) -> None:
        weight = self._weight(now)  # first: it may put other sums in place of these
        self._sums[index] += amount * weight

    def all(self, *, now: float) -> list[float]:
        weight = self._weight(now)
        return [value / weight for value in self._sums]

    def _weight(self, now: float) -> float:
        age = (now - self._since) / self._half_life_s
        if age > RESCALE_AT:
            factor = math.exp2(-min(age, 1000.0))
            self._sums = array("d", (value * factor for value in self._sums))
            self._since, age = now, 0.0
        return math.exp2(age)
