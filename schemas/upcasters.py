"""Old events as today's: one small pure function for each step from version n to n+1 of a kind.

Stored events are never rewritten. Reading one lifts its raw mapping step by step to the newest version, then
converts it. A kind that this release doesn't know (written by a newer one) is kept as it is: `UnknownEvent`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from schemas.control import AnyControlEvent, ControlEvent
from schemas.events import AnyEvent, Event

Mapped = dict[str, Any]
Step = Callable[[Mapped], Mapped]

STEPS: dict[tuple[str, int], Step] = {}  # (kind, version) -> the step to version + 1; none is needed yet

_KINDS: frozenset[str] = frozenset(
    str(cls.__struct_config__.tag) for base in (Event, ControlEvent) for cls in base.__subclasses__()
)


class UnknownEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a kind or version that only a newer release can read. Its members are kept."""

    kind: str
    v: int
    members: dict[str, Any]


class _Head(msgspec.Struct, frozen=True):
    kind: str
    v: int = 1


_head = msgspec.json.Decoder(_Head).decode
Known = AnyEvent | AnyControlEvent
_current: Callable[[bytes], Known] = msgspec.json.Decoder(Known).decode
_mapping = msgspec.json.Decoder(dict[str, Any]).decode


def newest_version(kind: str, steps: Mapping[tuple[str, int], Step] = STEPS) -> int:
    version = 1
    while (kind, version) in steps:
        version += 1
    return version


def read_event(line: bytes, *, steps: Mapping[tuple[str, int], Step] = STEPS) -> Known | UnknownEvent:
    """The event that *line* (canonical JSON) holds, as the newest version of its kind.

    Raises: msgspec.ValidationError or msgspec.DecodeError if it isn't an event.
    """
    try:
        event = _current(line)
    except msgspec.ValidationError:
        pass  # an old version, a kind that we don't know, or no event at all: the careful way says which
    else:
        if event.v == newest_version(str(event.__struct_config__.tag), steps):
            return event
    head = _head(line)
    newest = newest_version(head.kind, steps)
    if head.kind not in _KINDS or head.v > newest:
        return UnknownEvent(kind=head.kind, v=head.v, members=_mapping(line))
    if head.v == newest:
        return _current(line)
    members = _mapping(line)
    for version in range(head.v, newest):
        members = {**steps[head.kind, version](members), "v": version + 1}
    lifted: Known = msgspec.convert(members, Known)
    return lifted
