"""Texts and numbers within the bounds that a JSON schema sets. *variant* counts different ones."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from math import ceil, floor
from typing import Any

from workers.providers.pattern_text import TEXT_CHARS_MAX, text_matching
from workers.providers.schema_walk import DeadEnd, Plain, bound, common_multiple, number


def _moment(variant: int) -> datetime:
    return datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=variant, seconds=variant)


def _address(variant: int) -> str:
    return f"https://example.com/{variant}"


_FORMATS: dict[str, Callable[[int], str]] = {
    "date-time": lambda variant: _moment(variant).strftime("%Y-%m-%dT%H:%M:%SZ"),
    "date": lambda variant: _moment(variant).strftime("%Y-%m-%d"),
    "time": lambda variant: _moment(variant).strftime("%H:%M:%SZ"),
    "duration": lambda variant: f"P{variant + 1}D",
    "email": lambda variant: f"user{variant}@example.com",
    "idn-email": lambda variant: f"user{variant}@example.com",
    "hostname": lambda variant: f"host{variant}.example.com",
    "idn-hostname": lambda variant: f"host{variant}.example.com",
    "ipv4": lambda variant: f"192.0.2.{variant % 254 + 1}",
    "ipv6": lambda variant: f"2001:db8::{variant % 65535 + 1:x}",
    "uri": _address,
    "uri-reference": _address,
    "iri": _address,
    "iri-reference": _address,
    "uri-template": _address,
    "url": _address,
    "uuid": lambda variant: f"00000000-0000-4000-8000-{variant:012x}",
    "json-pointer": lambda variant: f"/{variant}",
    "relative-json-pointer": str,
    "regex": lambda variant: f"^{variant}$",
    "byte": lambda _: "ZWNobw==",
}


def string(plain: Plain, *, name: str, variant: int) -> str:
    least, most = bound(plain, "minLength", 0), bound(plain, "maxLength", TEXT_CHARS_MAX)
    if least > TEXT_CHARS_MAX:
        raise DeadEnd("too long a text")
    if isinstance(plain.get("pattern"), str):
        text = text_matching(plain["pattern"], least + variant if least + variant <= most else least)
        if text is not None:
            return text
    if plain.get("format") in _FORMATS:
        sample = _FORMATS[plain["format"]](variant)
        if least <= len(sample) <= most:
            return sample
    ending = str(variant) if variant else ""
    text = name[: max(0, most - len(ending))] + ending
    return text if len(text) >= least else ending.rjust(least, "x") if ending else text.ljust(least, "x")


def number_for(plain: Plain, *, whole: bool, variant: int) -> int | float:
    step = _step(plain, whole=whole)
    size = step or Fraction(1)
    low, high = _bound(plain, "inimum", max), _bound(plain, "aximum", min)
    first = None if low is None else _multiple_from(plain, low, size)
    last = None if high is None else _multiple_up_to(plain, high, size)
    if first is None or last is None or first <= last:
        return _as_json(_pick(first, last, variant) * size)
    if step or low is None or high is None:
        raise DeadEnd("no number fits")
    return _as_json(low if low == high else low + (high - low) * Fraction(1 + variant, 2 + variant))


def _step(plain: Plain, *, whole: bool) -> Fraction | None:
    step = number(plain["multipleOf"]) if "multipleOf" in plain else None
    if step is not None and step <= 0:
        raise DeadEnd("multipleOf is not positive")
    if not whole:
        return step
    return Fraction(1) if step is None else common_multiple(step, Fraction(1))


def _bound(plain: Plain, what: str, tighter: Any) -> Fraction | None:
    stated = [number(plain[key]) for key in (f"m{what}", f"exclusiveM{what}") if key in plain]
    return tighter(stated) if stated else None


def _multiple_from(plain: Plain, low: Fraction, size: Fraction) -> int:
    first = ceil(low / size)
    return first + 1 if first * size == low and _excluded(plain, "exclusiveMinimum", low) else first


def _multiple_up_to(plain: Plain, high: Fraction, size: Fraction) -> int:
    last = floor(high / size)
    return last - 1 if last * size == high and _excluded(plain, "exclusiveMaximum", high) else last


def _excluded(plain: Plain, key: str, bound: Fraction) -> bool:
    return key in plain and number(plain[key]) == bound


def _pick(first: int | None, last: int | None, variant: int) -> int:
    if first is not None:
        return first + (variant if last is None else variant % (last - first + 1))
    return 1 + variant if last is None else min(1, last) - variant


def _as_json(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
