"""Which places are left alone after a fault, for how long, and which request may look whether they are back. Pure.

```
          fault                        its time is over                 somebody begins there
   UP ─────────────▶ COOLING ─────────────────────────▶ DUE ─────────────────────────▶ PROBING
    ▲                   ▲                                                               │   │
    │                   └──────────── the probe fails: twice as long ───────────────────┘   │
    └──────────────────────────────── the probe is answered ────────────────────────────────┘
```

A place is a model on a route. Attempts that began before a cool-down say nothing of it: neither do their faults prolong it,
nor do their answers end it. Source: docs/adr/0061-cooldown.md
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from schemas.ids import RouteId

PLACES_MAX = 4096  # the one that nothing happened at for the longest goes first
TRUSTED_S = 10.0  # a place that answered within this isn't judged by one fault
FAULTS_IN_A_ROW = 3  # it is by this many
FORGET_S = 60.0  # up for so long, its next cool-down is short again
WAIT_MAX_S = 600.0  # however long the provider says to stay away
PROBE_MAX_S = 600.0  # a probe that is out for longer is given up


class Standing(Enum):
    UP = "up"
    COOLING = "cooling"
    DUE = "due"  # the next attempt is the probe
    PROBING = "probing"  # the probe is out


@dataclass(slots=True)
class _Place:
    faults: int = 0  # since an attempt went well
    answered_at: float = -math.inf
    back_at: float = -math.inf  # when the last cool-down ended
    rounds: int = 0  # cool-downs without `FORGET_S` of peace between them
    since: float = 0.0  # of the present cool-down
    until: float | None = None  # None: up
    probe_at: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Pass:
    """The right to one attempt at a place; *probe* is the one that decides over it."""

    began_at: float
    probe: bool


class Cooldowns:
    """The standing of all places. *now* is monotonic seconds."""

    def __init__(self, *, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._places: OrderedDict[tuple[RouteId, str], _Place] = OrderedDict()

    def standing(self, route: RouteId, model: str, *, now: float) -> Standing:
        place = self._places.get((route, model))
        return Standing.UP if place is None else _standing(place, now)

    def is_open(self, route: RouteId, model: str, *, now: float) -> bool:
        """Whether an attempt may begin there."""
        return self.standing(route, model, now=now) in (Standing.UP, Standing.DUE)

    def why(self, route: RouteId, model: str, *, now: float) -> str:
        """Why the place isn't up, in words."""
        place = self._places.get((route, model))
        if place is None or place.until is None:
            return ""
        match _standing(place, now):
            case Standing.COOLING:
                return f"cooling for {place.until - now:.1f} s more after {place.why}"
            case Standing.PROBING:
                return f"being probed after {place.why}"
            case _:
                return f"due for a probe after {place.why}"

    def begin(self, route: RouteId, model: str, *, now: float) -> Pass:
        """An attempt begins. While a place is due, the first is its probe and no other."""
        place = self._places.get((route, model))
        if place is None or _standing(place, now) is not Standing.DUE:
            return Pass(now, probe=False)
        place.probe_at = now
        return Pass(now, probe=True)

    def answered(self, route: RouteId, model: str, given: Pass, *, now: float) -> None:
        """The attempt has given its first token."""
        place = self._place(route, model)
        if place.until is not None:
            if given.began_at <= place.since:
                return
            place.until, place.probe_at, place.back_at = None, None, now
            place.faults = 0
        place.answered_at = now

    def went_well(self, route: RouteId, model: str) -> None:
        """An attempt that had answered has ended without a fault. One that breaks in the middle must not pass for good."""
        place = self._places.get((route, model))
        if place is not None and place.until is None:
            place.faults = 0

    def failed(
        self, route: RouteId, model: str, given: Pass, *, now: float, why: str, sure: bool, wait_s: float | None = None
    ) -> None:
        """The attempt ended with a fault of the place's. *sure*: the next one would, too. *wait_s*: what the provider asks for."""
        place = self._place(route, model)
        if place.until is not None:
            if given.probe and place.probe_at == given.began_at:
                self._cool(place, now, why, wait_s)
            return
        if given.began_at < place.back_at:
            return
        place.faults += 1
        trusted = now - place.answered_at < TRUSTED_S and now - place.back_at > FORGET_S
        if sure or not trusted or place.faults >= FAULTS_IN_A_ROW:
            self._cool(place, now, why, wait_s)

    def dropped(self, route: RouteId, model: str, given: Pass) -> None:
        """The attempt ended, and it says nothing of the place: a probe's turn is free again."""
        place = self._places.get((route, model))
        if place is not None and given.probe and place.probe_at == given.began_at:
            place.probe_at = None

    def _cool(self, place: _Place, now: float, why: str, wait_s: float | None) -> None:
        if place.until is None and now - place.back_at > FORGET_S:
            place.rounds = 0
        length_s = min(self._longest_s, self._first_s * 2.0 ** min(place.rounds, 30))
        if wait_s is not None:
            length_s = max(length_s, min(wait_s, WAIT_MAX_S))
        place.rounds += 1
        place.faults, place.since, place.until, place.probe_at, place.why = 0, now, now + length_s, None, why

    def _place(self, route: RouteId, model: str) -> _Place:
        place = self._places.get((route, model))
        if place is None:
            place = self._places[route, model] = _Place()
            if len(self._places) > PLACES_MAX:
                self._places.popitem(last=False)
        self._places.move_to_end((route, model))
        return place


def _standing(place: _Place, now: float) -> Standing:
    if place.until is None:
        return Standing.UP
    if place.probe_at is not None and now - place.probe_at < PROBE_MAX_S:
        return Standing.PROBING
    return Standing.COOLING if now < place.until else Standing.DUE
