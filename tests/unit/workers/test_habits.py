from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest

from schemas.errors import ProviderNonsense, ProviderRejected
from workers.providers.base import Chunk
from workers.providers.habits import Habits, forces_call, say_max_tokens
from workers.providers.openai_chunks import ChunkReader
from workers.providers.sse import EventSplitter

CALL = {"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}


def reader(request: dict[str, Any] | None = None) -> ChunkReader:
    made = ChunkReader()
    numbers = count(1)
    made.habits = Habits(json.dumps(request or {}).encode(), new_id=lambda: f"call_made_{next(numbers)}")
    return made


def stream(*choices: dict[str, Any], request: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What a client gets of a stream that has these choices, a chunk each."""
    read = reader(request)
    chunks = [read.event(b"", json.dumps({"choices": [{"index": 0, **choice}]}).encode()) for choice in choices]
    return [of(chunk) for chunk in chunks]


def whole(message: dict[str, Any], finish: str | None = "stop", **request: Any) -> dict[str, Any]:
    body = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return of(reader(request).body(json.dumps(body).encode()))


def of(chunk: Chunk | None) -> dict[str, Any]:
    assert chunk is not None
    assert chunk.members is not None
    (choice,) = json.loads(chunk.members)["choices"]
    assert isinstance(choice, dict)
    return choice


def delta(**members: Any) -> dict[str, Any]:
    return {"delta": members, "finish_reason": None}


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_reasoning_has_the_name_that_clients_read_beside_its_own(name: str) -> None:
    (said,) = stream(delta(content="", **{name: "hm"}))
    assert said["delta"] == {"content": "", name: "hm", "reasoning_content": "hm"}
    assert whole({"content": "a", name: "hm"})["message"]["reasoning_content"] == "hm"


def test_reasoning_is_counted_once_under_however_many_names() -> None:
    for names in ({"reasoning": "hm"}, {"thinking": "hm"}, {"reasoning": "hm", "reasoning_content": "hm"}):
        chunk = reader().event(b"", json.dumps({"choices": [{"index": 0, **delta(**names)}]}).encode())
        assert chunk is not None
        assert chunk.tokens == 1


def test_reasoning_that_is_no_text_is_left_as_it_is() -> None:
    (said,) = stream(delta(reasoning={"effort": "low"}))
    assert said["delta"] == {"reasoning": {"effort": "low"}}


def test_empty_finish_reason_of_a_stream_is_none() -> None:
    first, last = stream({"delta": {"content": "a"}, "finish_reason": ""}, {"delta": {}, "finish_reason": "stop"})
    assert (first["finish_reason"], last["finish_reason"]) == (None, "stop")


def test_stream_whose_finish_reasons_are_all_empty_is_not_finished() -> None:
    read = reader()
    read.event(b"", b'{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":""}]}')
    assert not read.finished


def test_empty_finish_reason_of_a_whole_answer_is_stop() -> None:
    assert whole({"content": "a"}, "")["finish_reason"] == "stop"


def test_stop_after_tool_calls_is_tool_calls() -> None:
    _, last = stream(delta(tool_calls=[CALL]), {"delta": {"content": ""}, "finish_reason": "stop"})
    assert last["finish_reason"] == "tool_calls"
    assert whole({"content": None, "tool_calls": [CALL]})["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_other_reasons_after_tool_calls_stay(reason: str) -> None:
    _, last = stream(delta(tool_calls=[CALL]), {"delta": {}, "finish_reason": reason})
    assert last["finish_reason"] == reason


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_stop_after_a_forced_call_stays_as_openai_says_it(choice: Any) -> None:
    _, last = stream(delta(tool_calls=[CALL]), {"delta": {}, "finish_reason": "stop"}, request={"tool_choice": choice})
    assert last["finish_reason"] == "stop"


@pytest.mark.parametrize(("choice", "forced"), [(None, False), ("auto", False), ("none", False), ("required", True)])
def test_a_call_is_forced_by_the_request_alone(choice: Any, forced: bool) -> None:
    assert forces_call(json.dumps({"tool_choice": choice}).encode()) is forced
    assert not forces_call(b"{}")


def test_whole_calls_without_index_are_counted() -> None:
    """An older Ollama sends each call in one piece, and several in one chunk or in one after the other."""
    call = {name: value for name, value in CALL.items() if name != "index"}
    first, second = stream(
        delta(tool_calls=[{**call, "id": "a"}, {**call, "id": "b"}]), delta(tool_calls=[{**call, "id": "c"}])
    )
    assert [(c["index"], c["id"]) for c in first["delta"]["tool_calls"]] == [(0, "a"), (1, "b")]
    assert [(c["index"], c["id"]) for c in second["delta"]["tool_calls"]] == [(2, "c")]


def test_pieces_without_index_go_on_with_the_last_call() -> None:
    _, second = stream(
        delta(tool_calls=[{"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]),
        delta(tool_calls=[{"function": {"arguments": "{}"}}]),
    )
    assert second["delta"]["tool_calls"] == [{"function": {"arguments": "{}"}, "index": 0}]


def test_calls_that_share_an_index_are_told_apart_by_their_ids() -> None:
    first, second = stream(
        delta(tool_calls=[{**CALL, "id": "a"}]),
        delta(tool_calls=[{**CALL, "id": "b"}]),
    )
    assert [c["delta"]["tool_calls"][0]["index"] for c in (first, second)] == [0, 1]


def test_call_without_id_or_type_gets_them_once() -> None:
    bare = {"index": 0, "function": {"name": "f", "arguments": ""}}
    first, second = stream(delta(tool_calls=[bare]), delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]))
    assert first["delta"]["tool_calls"] == [{**bare, "id": "call_made_1", "type": "function"}]
    assert second["delta"]["tool_calls"] == [{"index": 0, "function": {"arguments": "{}"}}]


def test_arguments_that_are_an_object_become_json_text() -> None:
    function = {"name": "f", "arguments": {"city": "Łódź", "n": [1, 2]}}
    said = whole({"content": "", "tool_calls": [{"function": function}]})
    (call,) = said["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == function["arguments"]
    (piece,) = stream(delta(tool_calls=[{**CALL, "function": function}]))
    assert json.loads(piece["delta"]["tool_calls"][0]["function"]["arguments"]) == function["arguments"]


def test_whole_call_without_arguments_has_an_empty_object() -> None:
    said = whole({"content": "", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]})
    assert said["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert "index" not in said["message"]["tool_calls"][0]


def test_stream_as_openai_sends_it_is_not_touched() -> None:
    events = [
        b'{"choices":[{"index": 0,"delta":{"role":"assistant","content":null}, "finish_reason":null}]}',
        (
            b'{"choices":[{"index": 0,"delta":{"tool_calls":[ {"index":1,"id":"b","type":"function",'
            b'"function":{"name":"g","arguments":""}} ]},"finish_reason":null}]}'
        ),
        (
            b'{"choices":[{"index": 0,"delta":{"tool_calls":[ {"index":0,"id":"a","type":"function",'
            b'"function":{"name":"f","arguments":""}} ]},"finish_reason":null}]}'
        ),
        b'{"choices":[{"index": 0,"delta":{"tool_calls":[ {"index":1,"function":{"arguments":"{\\"a\\":1}"}} ]}}]}',
        b'{"choices":[{"index": 0,"delta":{"reasoning_content":"x","reasoning":"x"},"finish_reason":null}]}',
        b'{"choices":[{"index": 0,"delta":{ }, "finish_reason":"tool_calls"}]}',
    ]
    read = reader()
    chunks = [read.event(b"", event) for event in events]
    assert [chunk.members for chunk in chunks if chunk is not None] == events


def test_calls_of_a_shape_of_their_own_are_left_to_the_client() -> None:
    odd = {"tool_calls": {"f": [1]}, "content": "a"}
    assert whole(odd)["message"] == odd


@pytest.mark.parametrize("choices", [b'[{"index":0,"delta":{"thinking":"a"},"finish_reason":5}]', b'{"thinking":1}'])
def test_choices_that_are_none_are_nonsense(choices: bytes) -> None:
    with pytest.raises(ProviderNonsense):
        reader().event(b"", b'{"choices":' + choices + b"}")


def test_error_in_a_field_of_its_own_is_the_error_it_is() -> None:
    """Older llama.cpp writes `error: {…}` where a stream has `data: {…}`."""
    said = b'error: {"code":400,"message":"too long","type":"invalid_request_error"}\n\n'
    ((name, data),) = EventSplitter(1000).feed(said)
    with pytest.raises(ProviderRejected, match="too long"):
        reader().event(name, data)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 7}, {"max_completion_tokens": 5, "max_tokens": 7}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": None}, {"max_completion_tokens": None}),
    ],
)
def test_limit_is_said_under_its_older_name_too(given: dict[str, Any], expected: dict[str, Any]) -> None:
    import msgspec

    body = msgspec.json.decode(json.dumps(given).encode(), type=dict[str, msgspec.Raw])
    say_max_tokens(body)
    assert json.loads(msgspec.json.encode(body)) == expected
