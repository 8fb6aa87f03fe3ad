"""Every event ever written can still be read: tests/golden has each version of each kind, as its bytes were.

A file is never edited. A new version of a kind gets a new file, and a step in schemas/upcasters.py.
"""

from __future__ import annotations

import msgspec
import pytest

from schemas.codec import encode
from schemas.control import ControlEvent
from schemas.events import Event
from schemas.upcasters import UnknownEvent, newest_version, read_event
from tests.golden_corpus import FILES, Golden

KINDS = {str(cls.__struct_config__.tag) for base in (Event, ControlEvent) for cls in base.__subclasses__()}


def test_every_version_of_every_kind_is_in_the_corpus() -> None:
    wanted = {(kind, version) for kind in KINDS for version in range(1, newest_version(kind) + 1)}
    assert {(golden.kind, golden.version) for golden in FILES} == wanted


@pytest.mark.parametrize("golden", FILES, ids=str)
def test_it_is_read_as_the_newest_version(golden: Golden) -> None:
    for line in golden.lines:
        event = read_event(line)
        assert not isinstance(event, UnknownEvent)
        assert event.__struct_config__.tag == golden.kind
        assert event.v == newest_version(golden.kind)


@pytest.mark.parametrize("golden", [g for g in FILES if g.version == newest_version(g.kind)], ids=str)
def test_no_member_is_renamed_dropped_or_given_another_meaning(golden: Golden) -> None:
    for line in golden.lines:
        written = msgspec.json.decode(line)
        now = msgspec.json.decode(encode(read_event(line)))
        assert {name: now.get(name) for name in written} == written


@pytest.mark.parametrize("golden", FILES, ids=str)
def test_its_bytes_are_canonical(golden: Golden) -> None:
    """No spaces, and text as UTF-8: what was hashed is what is here."""
    for line in golden.lines:
        assert msgspec.json.encode(msgspec.json.decode(line)) == line
