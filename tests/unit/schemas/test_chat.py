"""What a body must be to become a request, what its sender is told otherwise, and what travels on unseen."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest

from schemas.chat import ChatRequest, decode_request
from schemas.errors import BadRequest
from tests.unit.schemas.bodies import CONVERSATION, EVERY_FIELD, HELLO, TOOL

ROLES = "'developer', 'system', 'user', 'assistant', 'tool', 'function'."


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "echo", "messages": [HELLO], **changes}).encode()


def refused(raw: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        decode_request(raw)
    return caught.value


def test_every_documented_field_is_accepted_and_kept() -> None:
    request = decode_request(json.dumps(EVERY_FIELD).encode())
    kept = json.loads(msgspec.json.encode(request))
    assert set(kept) == set(EVERY_FIELD)
    assert {name for name, value in kept.items() if value is None} == set()
    assert kept["tools"][0]["function"]["name"] == "look_up"
    assert kept["response_format"]["json_schema"]["strict"] is True


@pytest.mark.parametrize("name", sorted(set(EVERY_FIELD) - {"model", "messages"}))
def test_every_optional_field_may_be_null(name: str) -> None:
    decode_request(body(**{name: None}))


@pytest.mark.parametrize("name", sorted(EVERY_FIELD))
def test_a_field_of_the_wrong_type_is_refused_by_name(name: str) -> None:
    wrong: Any = {"neither": 1} if isinstance(EVERY_FIELD[name], str | int | float | list) else [[]]
    error = refused(body(**{name: wrong}))
    assert (error.param or "").startswith(name)
    assert name in error.message


def test_every_role_and_every_part_is_accepted() -> None:
    decode_request(body(messages=CONVERSATION))


def test_messages_are_the_bytes_that_were_sent() -> None:
    sent = b'[ {"role":"user",  "content":"h\\u00e9llo", "zzz": 1e5} ]'
    request = decode_request(b'{"messages":' + sent + b', "model":"m"}')
    assert request.messages_raw == sent
    assert hashlib.sha256(request.messages).digest() == hashlib.sha256(sent).digest()


def test_messages_are_the_bytes_that_were_sent_also_beside_undocumented_types() -> None:
    sent = b'[{"role":"user","content":[{"type":"video_url",  "video_url":{"url":"x"}}]}]'
    request = decode_request(b'{"model":"m","tools":[{"type":"web_search"}],"messages":' + sent + b"}")
    assert request.messages_raw == sent


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 40, "provider": {"order": ["a"]}, "transforms": []},
        {"tools": [{"type": "web_search_preview", "depth": 3}, TOOL]},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": "any"},
        {"response_format": {"type": "grammar", "grammar": "root ::= x"}},
        {"prediction": {"type": "content", "content": [{"type": "sketch"}]}},
        {"reasoning_effort": "ludicrous", "service_tier": "on_demand", "verbosity": "chatty", "modalities": ["image"]},
        {"temperature": 9.5, "top_p": 3, "top_logprobs": 100, "seed": 2**80, "logit_bias": {"1": 0.5}},
        {"stop": ["a", "b", "c", "d", "e"], "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"messages": [{**HELLO, "reasoning_content": "x", "cache_control": {"type": "ephemeral"}}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": 7}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "mcp", "id": 4}]}]},
    ],
)
def test_what_is_not_documented_passes(changes: dict[str, Any]) -> None:
    decode_request(body(**changes))


def test_the_dummy_zeros_of_the_sdks_own_tests_pass() -> None:
    request = decode_request(body(max_tokens=0, max_completion_tokens=0, top_logprobs=0, stream_options={}))
    assert request.max_output_tokens == 0


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": {}}, "messages", "expected an array, but got an object"),
        ({"messages": ["hi"]}, "messages[0]", "expected an object, but got a string"),
        ({"messages": [HELLO, {"content": "x"}]}, "messages[1].role", "Missing required parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'assistant', 'tool', 'function'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing required parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "but got null"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "expected a string or an array"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "Missing"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name", "Missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "new"}, {"type": "text", "text": 1}]}]},
            "messages[0].content[1].text",
            "expected a string, but got an integer",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url.url",
            "Missing",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}]},
            "messages[0].tool_calls[0].function",
            "Missing",
        ),
        ({"model": ""}, "model", "length >= 1"),
        ({"model": 3}, "model", "expected a string, but got an integer"),
        ({"n": 0}, "n", "an integer >= 1"),
        ({"n": 129}, "n", "an integer <= 128"),
        ({"n": 1.5}, "n", "expected an integer, but got a number"),
        ({"max_tokens": -1}, "max_tokens", "an integer >= 0"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "an integer >= 0"),
        ({"temperature": "hot"}, "temperature", "expected a number, but got a string"),
        ({"stream": "yes"}, "stream", "expected a boolean, but got a string"),
        ({"metadata": {"a": 1}}, "metadata", "a value in 'metadata': expected a string"),
        ({"stop": [1]}, "stop[0]", "expected a string"),
        ({"tools": [TOOL, {"type": "function"}]}, "tools[1].function", "Missing"),
        ({"tools": [{"type": "novel"}, {"type": "function"}]}, "tools[1].function", "Missing"),
        ({"tools": [{"name": "f"}]}, "tools[0].type", "Missing"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "Missing"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "expected a boolean"),
    ],
)
def test_a_refusal_names_the_parameter_and_says_what_is_wrong(changes: dict[str, Any], param: str, words: str) -> None:
    error = refused(body(**changes))
    assert error.param == param
    assert words in error.message
    assert error.code == "invalid_request"


@pytest.mark.parametrize(
    ("raw", "param", "words"),
    [
        (b"", None, "empty"),
        (b" \r\n\t", None, "empty"),
        (b"{}", "model", "Missing required parameter: 'model'"),
        (b'{"model":"m"}', "messages", "Missing required parameter: 'messages'"),
        (b"[]", None, "the request body: expected an object, but got an array"),
        (b"null", None, "expected an object, but got null"),
        (b'"text"', None, "expected an object, but got a string"),
        (b'{"model":"m"', None, "truncated"),
        (b'{"model":"m",}', None, "trailing comma in object (byte 13)"),
        (b'{"model":"m"} x', None, "(byte 15)"),
        (b'{"model":"m","messages":[{"role":"user","content":"x",}]}', None, "could not be parsed"),
        (b'{"model":"m","temperature":NaN}', None, "byte 27"),
        (
            b'{"model":"m","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
            "temperature",
            "out of range",
        ),
        (b'{"model":"m","messages":[{"role":"bot","x":1e999}]}', "messages[0].role", "'bot'"),
        (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', None, "not valid UTF-8 (byte 51)"),
        (b'{"model":"m","unknown":"\xc3("}', None, "not valid UTF-8"),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}],"x":' + b"[" * 50_000, None, "nested too deeply"),
        (b'{"model":"m","messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}", None, "nested too deeply"),
    ],
)
def test_what_is_not_a_request_at_all_is_refused_with_a_sentence(raw: bytes, param: str | None, words: str) -> None:
    error = refused(raw)
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"{}", "Missing required parameter: 'model'."),
        (b"[]", "Invalid type for the request body: expected an object, but got an array instead."),
        (b'{"model":', "The JSON body of the request could not be parsed: Input data was truncated."),
        (b"{]", "The JSON body of the request could not be parsed: object keys must be strings (byte 1)."),
        (body(stop=5), "Invalid type for 'stop': expected a string or an array, but got an integer instead."),
        (body(n=0), "Invalid value for 'n': expected an integer >= 1."),
        (
            body(logit_bias={"1": "x"}),
            "Invalid type for a value in 'logit_bias': expected a number, but got a string instead.",
        ),
        (body(tools=[{"type": 3}]), "Invalid type for 'tools[0].type': expected a string, but got an integer instead."),
        (body(temperature=1).replace(b": 1}", b": -1e999}"), "Invalid value for 'temperature': Number out of range."),
        (
            body(messages=[{"role": "bot"}]),
            "Invalid value for 'messages[0].role': 'bot'. Supported values are: " + ROLES,
        ),
    ],
)
def test_a_refusal_is_a_whole_sentence(raw: bytes, sentence: str) -> None:
    assert refused(raw).message == sentence


def test_a_refusal_quotes_only_so_much_of_a_long_value() -> None:
    error = refused(body(messages=[{"role": "x" * 10_000, "content": ""}]))
    assert len(error.message) == 500
    assert error.message.endswith("…")


def test_text_beyond_ascii_is_accepted() -> None:
    decode_request(json.dumps({"model": "m", "messages": [{"role": "user", "content": "Grüße 🌍"}]}).encode())
    decode_request('{"model":"m","messages":[{"role":"user","content":"Grüße 🌍"}]}'.encode())


@pytest.mark.parametrize(("given", "stream"), [({}, False), ({"stream": None}, False), ({"stream": True}, True)])
def test_a_stream_is_given_only_when_asked_for(given: dict[str, Any], stream: bool) -> None:
    assert decode_request(body(**given)).stream is stream


@pytest.mark.parametrize(
    ("options", "usage", "obfuscation"),
    [
        (None, False, True),
        ({}, False, True),
        ({"include_usage": True}, True, True),
        ({"include_usage": False, "include_obfuscation": False}, False, False),
        ({"include_usage": None, "include_obfuscation": None}, False, True),
    ],
)
def test_usage_is_given_only_when_asked_for_and_obfuscation_unless_refused(
    options: dict[str, Any] | None, usage: bool, obfuscation: bool
) -> None:
    request = decode_request(body(stream=True, stream_options=options))
    assert (request.include_usage, request.include_obfuscation) == (usage, obfuscation)


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_completion_tokens": 5}, 5),
        ({"max_tokens": 7, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 7, "max_completion_tokens": 0}, 0),
    ],
)
def test_the_new_name_of_the_token_limit_wins_over_the_old_one(given: dict[str, int], most: int | None) -> None:
    assert decode_request(body(**given)).max_output_tokens == most


@pytest.mark.parametrize(("given", "n"), [({}, 1), ({"n": None}, 1), ({"n": 1}, 1), ({"n": 128}, 128)])
def test_one_choice_is_the_default(given: dict[str, Any], n: int) -> None:
    assert decode_request(body(**given)).n == n


def test_a_request_cannot_be_changed() -> None:
    request: ChatRequest = decode_request(body())
    with pytest.raises(AttributeError):
        request.model = "another"  # type: ignore[misc]
