"""How long a request may wait for what: the operator's word, the key's, the route's and its own, made into one. Pure.

The most specific counts: the request's own headers before its key, its key before the route, the route before
``ingress.timeouts``. What a request asks for is bounded by its key where that says something, else by the larger of
``ingress.timeouts_max`` and what holds without asking. Source: docs/adr/0064-waiting.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from schemas.errors import (
    BadRequest,
    FirstTokenTimeout,
    IdleTimeout,
    PenstockError,
    ProviderTimeout,
    QueueTimeout,
    TotalTimeout,
)
from schemas.jobs import TimeLimits, Timeouts

HEADER = b"x-penstock-timeout-"
FIELDS = {b"queue": "queue_s", b"first-token": "first_token_s", b"idle": "idle_s", b"total": "total_s"}
ASKED_MIN_S = 0.001

_SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")

NOT_SAID = TimeLimits()

_WAITED_FOR: dict[type[PenstockError], tuple[str, ...]] = {
    QueueTimeout: ("queue_s",),
    FirstTokenTimeout: ("first_token_s",),
    IdleTimeout: ("idle_s",),
    TotalTimeout: ("total_s",),
    ProviderTimeout: ("first_token_s", "idle_s", "total_s"),  # the worker holds its provider to the job's
}


def asked(headers: list[tuple[bytes, bytes]]) -> TimeLimits:
    """What the request's headers ask for, in seconds. Raises: BadRequest for one that isn't a time."""
    found = {_field(name): _seconds(name, value) for name, value in headers if name.startswith(HEADER)}
    return TimeLimits(**found) if found else NOT_SAID


def _field(name: bytes) -> str:
    field = FIELDS.get(name.removeprefix(HEADER))
    if field is None:
        known = ", ".join((HEADER + each).decode() for each in FIELDS)
        raise BadRequest(f"There is no header '{_shown(name)}'. There are {known}.", param=_shown(name))
    return field


def _seconds(name: bytes, value: bytes) -> float:
    if not _SECONDS.fullmatch(value) or float(value) < ASKED_MIN_S:
        raise BadRequest(
            f"The header '{_shown(name)}' must be a number of seconds above 0, such as 2.5, and not '{_shown(value)}'.",
            param=_shown(name),
        )
    return float(value)


def _shown(raw: bytes) -> str:
    return raw[:100].decode("latin-1")


@dataclass(frozen=True, slots=True)
class Waits:
    """Of one request: *default* and *most* are the operator's, *key* and *own* what its key and its headers say."""

    default: Timeouts
    most: Timeouts
    key: TimeLimits = NOT_SAID
    own: TimeLimits = NOT_SAID

    def at(self, route: TimeLimits = NOT_SAID) -> Timeouts:
        """The time-outs of an attempt at a route that says *route*; ``total_s`` is never longer than the request's."""
        if route == NOT_SAID and self.key == NOT_SAID and self.own == NOT_SAID:
            return self.default
        total_s = min(self._one("total_s", route), self.total_s)
        return Timeouts(
            queue_s=self._one("queue_s", route),
            first_token_s=self._one("first_token_s", route),
            idle_s=self._one("idle_s", route),
            total_s=total_s,
        )

    @property
    def total_s(self) -> float:
        """Of the request, over all of its attempts: no route has a say in it."""
        return self._one("total_s", NOT_SAID)

    def impatient(self, error: PenstockError, route: TimeLimits = NOT_SAID) -> bool:
        """Whether *error* is a time-out that the key or the request made shorter: then it says nothing of the route."""
        names = next((names for cls, names in _WAITED_FOR.items() if isinstance(error, cls)), ())
        return any(self._one(name, route) < self._patient(name, route) for name in names)

    def _patient(self, name: str, route: TimeLimits) -> float:
        at_route: float | None = getattr(route, name)
        default: float = getattr(self.default, name)
        return default if at_route is None else at_route

    def _one(self, name: str, route: TimeLimits) -> float:
        default: float = getattr(self.default, name)
        stated: float | None = getattr(self.key, name)
        asked_s: float | None = getattr(self.own, name)
        at_route: float | None = getattr(route, name)
        without_asking = stated if stated is not None else at_route if at_route is not None else default
        if asked_s is None:
            return without_asking
        return min(asked_s, stated if stated is not None else max(without_asking, getattr(self.most, name)))
