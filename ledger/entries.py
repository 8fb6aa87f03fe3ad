"""A line of the log as the ledger will store it. Every line becomes an entry: nothing is dropped, nothing stops the ledger."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from ledger.clock import NS_MAX, utc
from schemas.control import ControlEvent
from schemas.events import Event, RequestFinished
from schemas.upcasters import STEPS, Known, Step, UnknownEvent, read_event

UNREADABLE = "unreadable"  # the kind of a line that is no event
INT64_MAX = 2**63 - 1
NAME_MAX_CHARS = 1024  # of a kind

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}").fullmatch


class Entry(NamedTuple):
    """*event* is the line as today's release reads it; None if it can't, and then there is nothing to project."""

    id: str | None
    kind: str
    v: int | None
    ts: datetime | None
    org: str | None
    request_id: str | None
    epoch: int | None
    producer: str | None
    payload: str
    event: Known | None
    problem: str | None = None  # why it is unreadable


class _Version(msgspec.Struct):
    v: int = 1


_version_of = msgspec.json.Decoder(_Version).decode


def read_line(line: bytes, *, steps: Mapping[tuple[str, int], Step] = STEPS) -> Entry:
    """*line* (canonical JSON) as an entry. Never raises: what can't be read is kept as `UNREADABLE`, with its bytes."""
    try:
        event = read_event(line, steps=steps)
        if isinstance(event, UnknownEvent):
            return _of_unknown(event, line)
        v = _version_of(line).v if steps else event.v
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return unreadable(line, type(error).__name__)
    if (problem := _problem(event)) is not None:
        return unreadable(line, problem)
    kind = str(event.__struct_config__.tag)
    match event:
        case Event():
            return Entry(
                event.id, kind, v, utc(event.ts_ns), event.org, event.request_id, event.epoch,
                event.producer, line.decode(), event,
            )  # fmt: skip
        case ControlEvent():
            org: str | None = getattr(event, "org", None)
            return Entry(event.id, kind, v, utc(event.ts_ns), org, None, None, event.producer, line.decode(), event)


def unreadable(line: bytes, problem: str) -> Entry:
    payload = msgspec.json.encode({"bytes_base64": base64.b64encode(line).decode()}).decode()
    return Entry(None, UNREADABLE, None, None, None, None, None, None, payload, None, problem)


def too_large(event: Known) -> bool:
    """Whether a number in *event* is out of the database's range: looked at only when it has refused a batch."""
    usage = getattr(event, "usage", None)
    numbers = [getattr(event, name) for name in event.__struct_fields__] + list(
        msgspec.structs.astuple(usage) if usage else ()
    )
    return any(isinstance(n, int) and not -INT64_MAX <= n <= INT64_MAX for n in numbers)


def _of_unknown(event: UnknownEvent, line: bytes) -> Entry:
    """A newer release wrote it: what looks like our envelope is shown, everything else waits for that release."""
    if len(event.kind) > NAME_MAX_CHARS or not 0 <= event.v <= INT64_MAX:
        return unreadable(line, "kind or version out of range")
    get = event.members.get
    ts_ns = _int(get("ts_ns"))
    return Entry(
        _uuid(get("id")), event.kind, event.v, None if ts_ns is None else utc(ts_ns), _text(get("org")),
        _uuid(get("request_id")), _int(get("epoch")), _text(get("producer")), line.decode(), None,
    )  # fmt: skip


def _problem(event: Known) -> str | None:
    """Why the tables can't hold *event*; None for every event that this product writes."""
    if not _UUID(event.id):
        return "its id is not a UUID"
    if isinstance(event, Event) and not _UUID(event.request_id):
        return "its request_id is not a UUID"
    if not 0 <= event.ts_ns <= NS_MAX or (isinstance(event, RequestFinished) and not 0 <= event.accepted_ns <= NS_MAX):
        return "its time is out of range"
    return None


def _uuid(value: Any) -> str | None:
    return value if isinstance(value, str) and _UUID(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= INT64_MAX else None
