"""How a route stands at one worker, as presence and `penstock routes` tell it: its keys, its limits, its health.

A key is told by the place that it is read from, or by its number: never by itself or a part of it.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct


class KeyState(StrEnum):
    READY = "ready"
    COOLING = "cooling"  # the provider said 429: it rests
    DEAD = "dead"  # the provider refused it, or it can't be read


class KeyStanding(Struct, frozen=True, kw_only=True):
    """One of a route's keys. What is left is as the provider's headers told it last, less what was sent since."""

    label: str
    state: KeyState = KeyState.READY
    reason: str | None = None  # why it isn't ready
    for_s: float | None = None  # it cools so long yet; a dead one is tried again then
    running: int = 0
    requests_left: int | None = None
    tokens_left: int | None = None


class Rates(Struct, frozen=True, kw_only=True):
    """What the last minute took of the limits that the route states; 0 is no limit."""

    requests: int = 0
    requests_per_minute: int = 0
    tokens: int = 0
    tokens_per_minute: int = 0


class Health(Struct, frozen=True, kw_only=True):
    """What the provider's last answers were like."""

    error_rate: float = 0.0  # of the tries of the last minutes, recent ones counting more
    first_token_ms: int | None = None  # the median of the last streams


class Standing(Struct, frozen=True, kw_only=True, omit_defaults=True):
    keys: tuple[KeyStanding, ...] = ()
    rates: Rates | None = None
    health: Health | None = None


UNTOLD = Standing()
