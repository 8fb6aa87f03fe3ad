"""Whatever a chunk holds, its event is one line of valid JSON with our members and the provider's, and tells no length."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ingress.sse import OBFUSCATION_BLOCK, EventWriter, usage_json, whole_body
from schemas.ids import RequestId, completion_id, new_id
from tests.property.strategies import json_values, names, text, usages

OURS = {"id", "object", "created", "model", "usage", "obfuscation"}

further = st.dictionaries(text.filter(lambda name: name not in OURS | {"choices"}), json_values, max_size=4)
deltas = st.fixed_dictionaries({"choices": st.lists(json_values, max_size=3)})
chunks = st.tuples(deltas, further).map(lambda both: {**both[0], **both[1]})
times = st.integers(0, 2**40)


def writer(request_id: RequestId, *, model: str, created: int, usage: bool, obfuscate: bool) -> EventWriter:
    return EventWriter(request_id, created=created, model=model, include_usage=usage, obfuscate=obfuscate)


def data_of(event: bytes) -> Any:
    first, data, *rest = event.split(b"\n")
    assert re.fullmatch(rb"id: [1-9][0-9]*", first)
    assert data.startswith(b"data: ")
    assert rest == [b"", b""]
    assert b"\r" not in event
    return msgspec.json.decode(data[6:])


@given(st.lists(chunks, min_size=1, max_size=4), names, times, st.booleans(), st.booleans())
def test_an_event_is_our_members_and_the_providers(
    given_: list[dict[str, Any]], model: str, created: int, usage: bool, obfuscate: bool
) -> None:
    request_id = RequestId(new_id())
    events = writer(request_id, model=model, created=created, usage=usage, obfuscate=obfuscate)
    ours = {
        "id": completion_id(request_id),
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        **({"usage": None} if usage else {}),
    }
    for chunk in given_:
        told = data_of(events.event(msgspec.json.encode(chunk)))
        assert ("obfuscation" in told) is obfuscate
        told.pop("obfuscation", None)
        assert told == {**chunk, **ours}


@given(st.lists(chunks, min_size=2, max_size=6), names)
def test_padded_events_of_a_stream_differ_in_length_by_whole_blocks(given_: list[dict[str, Any]], model: str) -> None:
    events = writer(RequestId(new_id()), model=model, created=1, usage=False, obfuscate=True)
    sizes = {len(events.event(msgspec.json.encode(chunk))) % OBFUSCATION_BLOCK for chunk in given_}
    assert len(sizes) == 1


@given(st.lists(chunks, min_size=1, max_size=3), names)
def test_padding_is_of_letters_and_digits_alone(given_: list[dict[str, Any]], model: str) -> None:
    events = writer(RequestId(new_id()), model=model, created=1, usage=False, obfuscate=True)
    for chunk in given_:
        padding = data_of(events.event(msgspec.json.encode(chunk)))["obfuscation"]
        assert len(padding) < OBFUSCATION_BLOCK
        assert padding == "" or (padding.isascii() and padding.isalnum())


@given(usages(), names, times)
def test_the_event_of_usage_has_no_choices(usage: Any, model: str, created: int) -> None:
    events = writer(RequestId(new_id()), model=model, created=created, usage=True, obfuscate=True)
    told = data_of(events.usage_event(usage_json(usage)))
    assert told["choices"] == []
    assert told["usage"]["total_tokens"] == usage.prompt_tokens + usage.completion_tokens
    assert told["model"] == model


@given(chunks, usages(), names, times)
def test_a_whole_answer_is_one_object(chunk: dict[str, Any], usage: Any, model: str, created: int) -> None:
    request_id = RequestId(new_id())
    members = msgspec.json.encode(chunk)
    body = whole_body(request_id, created=created, model=model, members=members, usage=usage_json(usage))
    told = msgspec.json.decode(body)
    assert told.pop("usage")["completion_tokens"] == usage.completion_tokens
    ours = {"id": completion_id(request_id), "object": "chat.completion", "created": created, "model": model}
    assert told == {**chunk, **ours}
