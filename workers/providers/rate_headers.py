"""What a provider's headers tell of its limits; pure.

The names are the table's (schemas/providers.py). How long until a limit is whole again is told in many ways: ``12ms`` and
``6m0s`` (OpenAI, Groq), seconds, a date (Anthropic), seconds or milliseconds since 1970.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from schemas.providers import RateLimitHeaders

RESET_MAX_S = 24 * 3600.0
EPOCH_MIN = 1e9  # a number from there on is a date: seconds since 1970, or milliseconds

_SPAN = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[dhms]))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[dhms])")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Told(NamedTuple):
    """Of requests, or of tokens: the limit, what is left of it, and in how many seconds it is whole again."""

    limit: int | None = None
    left: int | None = None
    reset_s: float | None = None


def told_requests(headers: Mapping[str, str], names: RateLimitHeaders, *, now: datetime) -> Told:
    return _told(headers, names.requests_limit, names.requests_remaining, names.requests_reset, now=now)


def told_tokens(headers: Mapping[str, str], names: RateLimitHeaders, *, now: datetime) -> Told:
    return _told(headers, names.tokens_limit, names.tokens_remaining, names.tokens_reset, now=now)


def reset_s(text: str | None, *, now: datetime) -> float | None:
    """Seconds until a reset, from any of the ways in which it is told; at most `RESET_MAX_S`."""
    text = (text or "").strip()
    if (number := _number(text)) is not None:
        if number >= EPOCH_MIN:
            number = number / (1000 if number >= EPOCH_MIN * 1000 else 1) - now.timestamp()
        return _bounded(number)
    if _SPAN.fullmatch(text):
        return _bounded(sum(float(count) * _UNIT_S[unit] for count, unit in _PART.findall(text)))
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return _bounded(((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds())


def _told(headers: Mapping[str, str], limit: str | None, left: str | None, reset: str | None, *, now: datetime) -> Told:
    if _count(headers, limit) == 0:  # some say so where there is none
        return Told()
    return Told(
        limit=_count(headers, limit),
        left=_count(headers, left),
        reset_s=None if reset is None else reset_s(headers.get(reset), now=now),
    )


def _count(headers: Mapping[str, str], name: str | None) -> int | None:
    number = None if name is None else _number(headers.get(name, ""))
    return None if number is None or number < 0 else int(number)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), RESET_MAX_S)
