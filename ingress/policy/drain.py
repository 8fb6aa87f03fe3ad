"""How fast what waits in the queue is begun, as this ingress sees it of its own jobs. Pure; times are monotonic seconds.

A start tells something of the speed only if somebody waited ever since the start before it, or it waited itself: else it was
the clients' speed and not the workers'. The jobs of several ingresses wait in the same queue, so the share of ours that begins
is the same as of all.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from schemas.ids import OrgId, RouteId

HALF_LIFE_S = 30.0
WAITED_S = 0.05  # a start that took longer than this was waited for
PLACES_MAX = 4096
RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0

Place = tuple[RouteId, str, OrgId]  # where jobs wait: a route, a model, whose


@dataclass(slots=True)
class _Line:
    waiting: int = 0
    steady: bool = False  # somebody has waited ever since the last start
    since: float = 0.0  # the last start, or the first of those that wait now
    starts: float = 0.0  # of late
    span_s: float = 0.0  # in which these were


class Drain:
    """The lines of all places. Each job `waits`, and then either `began` or `left`."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Place, _Line] = OrderedDict()

    def waits(self, place: Place, *, now: float) -> None:
        line = self._line(place)
        if line.waiting == 0:
            line.since, line.steady = now, False
        line.waiting += 1

    def began(self, place: Place, *, now: float) -> None:
        line = self._line(place)
        took_s = now - line.since
        if line.steady or took_s > WAITED_S:
            fading = 0.5 ** (took_s / HALF_LIFE_S)
            line.starts = line.starts * fading + 1.0
            line.span_s = line.span_s * fading + took_s
        line.waiting = max(0, line.waiting - 1)
        line.since, line.steady = now, line.waiting > 0

    def left(self, place: Place) -> None:
        line = self._line(place)
        line.waiting = max(0, line.waiting - 1)

    def retry_after_s(self, place: Place, *, now: float) -> float:
        """In how many seconds what waits at *place* will have begun, at the speed of late."""
        line = self._line(place)
        silent_s = now - line.since if line.waiting else 0.0
        each_s = (line.span_s + silent_s) / max(1.0, line.starts)
        return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, max(1, line.waiting) * each_s))

    def _line(self, place: Place) -> _Line:
        line = self._lines.get(place)
        if line is None:
            line = self._lines[place] = _Line()
            if len(self._lines) > PLACES_MAX:
                self._lines.popitem(last=False)
        self._lines.move_to_end(place)
        return line
