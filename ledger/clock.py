"""Nanoseconds since 1970, as events have them, to the database's timestamps (UTC, microseconds)."""

from __future__ import annotations

from datetime import datetime, timedelta

NS_MAX = 2**63 - 1  # in the year 2262

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - the database's TIMESTAMP has no zone; all of ours are UTC


def utc(ns: int) -> datetime:
    """*ns* from 0 to `NS_MAX`; cut to microseconds."""
    return _EPOCH + timedelta(microseconds=ns // 1000)


def ns_of(time: datetime) -> int:
    """The other way round: nanoseconds since 1970 of one of the database's timestamps."""
    return (time - _EPOCH) // timedelta(microseconds=1) * 1000
