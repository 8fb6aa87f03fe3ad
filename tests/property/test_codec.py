"""Whatever is said comes back as it was said, and its bytes are canonical: equal values, equal bytes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec
from schemas.control import KeyStated, OrgStated, RouteStated, decode_control
from schemas.events import Event
from schemas.frames import Delta, Faulted, Finished, Started, Yielded
from schemas.jobs import Announce, Cancel, Job, Presence, Resend, Take
from schemas.upcasters import UnknownEvent, read_event
from tests.property.strategies import json_values, of_struct

frames = st.one_of([of_struct(frame) for frame in (Started, Delta, Finished, Faulted, Yielded)])
commands = st.one_of([of_struct(command) for command in (Cancel, Resend, Announce, Take)])
statements = st.one_of([of_struct(statement, v=st.just(1)) for statement in (OrgStated, KeyStated, RouteStated)])
events = st.one_of([of_struct(event, v=st.just(1)) for event in Event.__subclasses__()])


def plain(value: Any) -> Any:
    """As comparable values: Raw has no equality of its own."""
    return msgspec.json.decode(msgspec.json.encode(value))


@given(frames)
def test_every_frame_comes_back(frame: Any) -> None:
    back = codec.decode_frame(codec.encode(frame))
    assert type(back) is type(frame)
    assert plain(back) == plain(frame)
    assert codec.encode(back) == codec.encode(frame)


@given(frames)
def test_the_chunks_of_a_frame_are_the_same_bytes_on_the_other_side(frame: Any) -> None:
    back = codec.decode_frame(codec.encode(frame))
    sent = [bytes(chunk) for chunk in getattr(frame, "chunks", ())]
    assert [bytes(chunk) for chunk in getattr(back, "chunks", ())] == sent


@given(of_struct(Job))
def test_every_job_comes_back_with_the_same_body(job: Job) -> None:
    back = codec.decode_job(codec.encode(job))
    assert bytes(back.body) == bytes(job.body)
    assert plain(back) == plain(job)


@given(commands)
def test_every_command_comes_back(command: Any) -> None:
    assert plain(codec.decode_command(codec.encode(command))) == plain(command)


@given(of_struct(Presence))
def test_every_presence_comes_back(presence: Presence) -> None:
    assert codec.decode_presence(codec.encode(presence)) == presence


@given(statements)
def test_every_statement_comes_back(statement: Any) -> None:
    assert decode_control(codec.encode(statement)) == statement


@given(events | statements)
def test_every_event_comes_back_from_the_ledgers_reader(event: Any) -> None:
    assert read_event(codec.encode(event)) == event


@given(events)
def test_an_event_never_holds_raw_json(event: Any) -> None:
    """Prompts and answers travel as raw JSON only: an event has no room for one."""
    assert msgspec.Raw not in {type(getattr(event, name)) for name in event.__struct_fields__}


@given(events, st.dictionaries(st.text(min_size=1, max_size=8).map("x_{}".format), json_values, max_size=3))
def test_an_event_of_an_unknown_kind_is_kept_whole(event: Any, more: dict[str, Any]) -> None:
    members = {**plain(event), **more, "kind": "request.dreamt"}
    kept = read_event(msgspec.json.encode(members))
    assert isinstance(kept, UnknownEvent)
    assert kept.members == plain(members)


@given(st.dictionaries(st.text(max_size=8), json_values, max_size=6))
def test_equal_mappings_are_equal_bytes_whatever_their_order(mapping: dict[str, Any]) -> None:
    backwards = dict(reversed(list(mapping.items())))
    assert codec.encode(mapping) == codec.encode(backwards)


@given(st.binary(max_size=60))
def test_noise_is_refused_as_a_decode_error(noise: bytes) -> None:
    for decode in (codec.decode_frame, codec.decode_job, codec.decode_command, codec.decode_presence, decode_control):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
            decode(noise)
