"""What echo says, as a value; the integration suite hears it spoken."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from schemas.errors import ProviderRejected
from workers.providers.echo_answer import ANSWER_TOKENS_MAX, Answer, answer, read

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def tool(name: str, parameters: Any = WEATHER) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def say(*messages: dict[str, Any], **members: Any) -> Answer:
    return answer(read(json.dumps({"model": "echo", "messages": messages, **members}).encode()))


def text(said: Answer) -> str:
    return "".join(said.text)


def called(said: Answer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads("".join(call.pieces))) for call in said.calls]


def test_the_last_user_message_is_echoed() -> None:
    said = say(
        {"role": "system", "content": "be kind"}, user("one"), {"role": "assistant", "content": "x"}, user("two words")
    )
    assert (text(said), said.finish_reason) == ("two words", "stop")
    assert (said.prompt_tokens, said.completion_tokens) == (2 + 1 + 1 + 2, 2)


def test_parts_that_are_no_text_are_noted() -> None:
    parts = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "new_thing"},
    ]
    assert text(say(user(parts))) == "Look: [image] [audio] [file] [new_thing]"


def test_without_a_user_message_whoever_spoke_last_is_echoed() -> None:
    assert text(say({"role": "developer", "content": "string"})) == "string"


def test_an_empty_message_has_an_empty_answer() -> None:
    said = say(user(""))
    assert (said.text, said.finish_reason, said.completion_tokens) == ([], "stop", 0)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [(0, ("", "length")), (2, ("a b", "length")), (3, ("a b c", "stop")), (9, ("a b c", "stop"))],
)
def test_the_answer_has_at_most_as_many_tokens_as_asked_for(name: str, limit: int, expected: tuple[str, str]) -> None:
    said = say(user("a b c"), **{name: limit})
    assert (text(said), said.finish_reason) == expected


def test_the_newer_name_of_the_limit_wins() -> None:
    assert text(say(user("a b c"), max_tokens=3, max_completion_tokens=1)) == "a"


def test_choices_share_the_bound_on_an_answer() -> None:
    said = say(user("word " * 2000), n=128)
    assert (len(said.text), said.finish_reason) == (ANSWER_TOKENS_MAX // 128, "length")
    assert said.completion_tokens == ANSWER_TOKENS_MAX


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(" c", "a b"), (["x", " c", "b"], "a "), ("", "a b c d"), ([], "a b c d"), (None, "a b c d")],
)
def test_the_answer_ends_before_the_first_stop_sequence(stop: Any, expected: str) -> None:
    said = say(user("a b c d"), stop=stop)
    assert (text(said), said.finish_reason) == (expected, "stop")


def test_the_first_tool_is_called_with_arguments_valid_for_its_schema() -> None:
    said = say(user("weather?"), tools=[tool("get_weather"), tool("other")])
    assert said.finish_reason == "tool_calls"
    ((name, arguments),) = called(said)
    assert name == "get_weather"
    Draft202012Validator(WEATHER).validate(arguments)


def test_tools_that_the_user_names_are_called_in_parallel_in_their_order() -> None:
    tools = [tool("alpha"), tool("beta"), tool("gamma"), tool("gam")]
    assert [name for name, _ in called(say(user("first gamma, then alpha."), tools=tools))] == ["gamma", "alpha"]
    assert [name for name, _ in called(say(user("gamma and alpha"), tools=tools, parallel_tool_calls=False))] == [
        "gamma"
    ]


def test_after_a_tools_result_comes_text() -> None:
    history = (
        user("weather?"),
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "a", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    )
    assert text(say(*history, tools=[tool("a")])) == "sunny"
    assert text(say(*history, tools=[tool("a")], tool_choice="auto")) == "sunny"


def test_required_calls_go_through_the_tools_so_that_a_loop_reaches_the_last() -> None:
    tools = [tool("look_up"), tool("final")]
    history = [user("go")]
    for expected in ("look_up", "final", "final"):
        ((name, _),) = called(say(*history, tools=tools, tool_choice="required"))
        assert name == expected
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": "{}"}}
        history += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "ok"}]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", []),
        (named("b"), ["b"]),
        (allowed("auto", tool("b")), ["b"]),
        (allowed("required", tool("b")), ["b"]),
    ],
)
def test_tool_choice_decides(choice: Any, names: list[str]) -> None:
    said = say(user("hi"), tools=[tool("a"), tool("b")], tool_choice=choice)
    assert [name for name, _ in called(said)] == names


def test_a_custom_tool_gets_the_text_as_its_input() -> None:
    said = say(user("run it"), tools=[{"type": "custom", "custom": {"name": "c"}}])
    assert [(call.kind, call.name, "".join(call.pieces)) for call in said.calls] == [("custom", "c", "run it")]


def test_legacy_functions_are_called_the_legacy_way() -> None:
    functions = [{"name": "f", "parameters": WEATHER}, {"name": "g"}]
    said = say(user("f and g"), functions=functions)
    assert (said.finish_reason, [call.kind for call in said.calls]) == ("function_call", ["legacy"])
    assert called(say(user("x"), functions=functions, function_call={"name": "g"})) == [("g", {})]
    assert text(say(user("x"), functions=functions, function_call="none")) == "x"


def test_a_call_that_is_too_long_is_cut_and_says_so() -> None:
    said = say(user("x"), tools=[tool("a")], max_tokens=3)
    assert (said.finish_reason, said.completion_tokens) == ("length", 3)
    assert say(user("x"), tools=[tool("a")], max_tokens=0).completion_tokens == 0


def test_a_json_schema_is_filled() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER, "strict": True}}
    Draft202012Validator(WEATHER).validate(json.loads(text(say(user("x"), response_format=form))))


def test_a_json_object_holds_the_echo() -> None:
    assert json.loads(text(say(user('say "hi"'), response_format={"type": "json_object"}))) == {"echo": 'say "hi"'}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": 7}, None),
        ({}, None),
        ({"messages": [user("x")], "n": 0}, "n"),
        ({"messages": [user("x")], "n": 129}, "n"),
        ({"messages": [user("x")], "max_tokens": -1}, "max_completion_tokens"),
        ({"messages": [user("x")], "tools": [{"type": "function"}]}, "tools"),
        (
            {
                "messages": [user("x")],
                "tools": [tool("a")],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tool_choice",
        ),
        (
            {
                "messages": [user("x")],
                "tools": [tool("a")],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}},
            },
            "tool_choice",
        ),
        ({"messages": [user("x")], "tools": [tool("a", {"$ref": "#"})]}, "tools"),
        ({"messages": [user("x")], "tools": [tool("a", 7)]}, "tools"),
        ({"messages": [user("x")], "tools": [tool("a", {"enum": ["x" * 1000] * 1000})]}, "tools"),
    ],
)
def test_what_cannot_be_answered_is_rejected_with_a_reason(body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(ProviderRejected) as caught:
        answer(read(json.dumps(body).encode()))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"messages":[{"role":"user","content":"\xff"}]}']
)
def test_a_body_that_is_no_request_is_rejected(body: bytes) -> None:
    with pytest.raises(ProviderRejected):
        read(body)
