"""Anthropic's and Google's own wires, through the libraries of the extra `wires`, against servers that speak them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import aclosing
from typing import Any

import pytest

from schemas.errors import (
    Fault,
    ProviderAuth,
    ProviderFailed,
    ProviderNonsense,
    ProviderRateLimited,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnreachable,
)
from schemas.money import Usage
from schemas.settings import WorkerSettings
from tests.factories import make_job
from tests.integration.providers.heard import hear
from tests.integration.wires.conftest import Wire
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

CANCEL_MAX_S = 0.1
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"name": "get_weather", "input": {"city": "Graz"}}


def asking(**members: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], **members}


def error_of(wire: Wire, status: int, *, type_: str = "api_error", message: str = "no", **google: Any) -> Any:
    if wire.name == "anthropic":
        return {"type": "error", "error": {"type": type_, "message": message}}
    return {"error": {"code": status, "message": message, "status": type_.upper(), **google}}


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_comes_with_its_text_finish_reason_and_usage(wire: Wire, stream: bool) -> None:
    wire.server.script(tokens=3, cached=7)
    heard = await hear(wire.provider(), make_job(asking(stream=stream)))
    assert heard.text == "w0 w1 w2"
    assert heard.voices[0].role == "assistant"
    assert heard.voices[0].finish == ["stop"]
    assert heard.usages[-1].usage == Usage(prompt_tokens=17, completion_tokens=3, cached_tokens=7)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_tool_call_is_heard_as_openai_says_it(wire: Wire, stream: bool) -> None:
    wire.server.script(tokens=1, call=CALL)
    chunks = [chunk async for chunk in wire.provider().generate(make_job(asking(stream=stream, tools=[TOOL])))]
    said = [json.loads(chunk.members)["choices"][0] for chunk in chunks if chunk.members is not None]
    calls = [call for choice in said for call in choice["delta" if stream else "message"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "get_weather"
    assert calls[0]["type"] == "function"
    assert calls[0]["id"]
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Graz"}
    assert {call.get("index") for call in calls} == ({0} if stream else {None})
    assert said[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [True, False])
async def test_reasoning_comes_under_the_name_that_clients_read(wire: Wire, stream: bool) -> None:
    wire.server.script(thinking="let me think")
    chunks = [chunk async for chunk in wire.provider().generate(make_job(asking(stream=stream)))]
    said = [json.loads(chunk.members)["choices"][0] for chunk in chunks if chunk.members is not None]
    told = [choice["delta" if stream else "message"].get("reasoning_content") for choice in said]
    assert "".join(text for text in told if text) == "let me think"


async def test_what_is_asked_for_reaches_the_wire_in_its_own_words(wire: Wire) -> None:
    body = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city":"Graz"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": '{"sky":"blue"}'},
        ],
        "tools": [TOOL],
        "tool_choice": "required",
        "max_completion_tokens": 77,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": "END",
        "n": 1,
        "logprobs": False,
        "user": "u",
        "stream_options": {"include_usage": True},
        "store": None,
    }
    await hear(wire.provider(), make_job({**body, "stream": True}))
    [seen] = wire.server.seen
    if wire.name == "anthropic":
        assert seen.headers["x-api-key"] == "sk-wire"
        assert seen.body["system"] == "Be brief."
        assert (seen.body["max_tokens"], seen.body["temperature"], seen.body["top_p"]) == (77, 0.5, 0.9)
        assert seen.body["stop_sequences"] == ["END"]
        assert seen.body["tool_choice"]["type"] == "any"
        assert [message["role"] for message in seen.body["messages"]] == ["user", "assistant", "user"]
    else:
        assert seen.headers["x-goog-api-key"] == "sk-wire"
        assert seen.body["systemInstruction"]["parts"] == [{"text": "Be brief."}]
        asked = seen.body["generationConfig"]
        assert (asked["maxOutputTokens"], asked["temperature"], asked["topP"]) == (77, 0.5, 0.9)
        assert asked["stopSequences"] == ["END"]
        assert seen.body["toolConfig"]["functionCallingConfig"]["mode"] == "ANY"
        assert [content["role"] for content in seen.body["contents"]] == ["user", "model", "user"]


async def test_models_are_listed_by_the_names_to_ask_for(wire: Wire) -> None:
    assert await wire.provider().models() == (("claude-x",) if wire.name == "anthropic" else ("gemini-x",))


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("logit_bias", {"1": 1}),
        ("something_new", 1),
        ("tool_choice", {"type": "allowed_tools"}),
        ("tools", [{"type": "custom", "custom": {"name": "x"}}]),
    ],
)
async def test_what_the_wire_cannot_honour_is_refused_by_name_and_not_left_out(
    wire: Wire, member: str, value: Any
) -> None:
    with pytest.raises(ProviderRejected) as caught:
        await hear(wire.provider(), make_job(asking(**{"tools": [TOOL], member: value})))
    assert (caught.value.status, caught.value.param) == (400, member)
    assert wire.server.seen == []


@pytest.mark.parametrize(
    "message",
    [
        {"role": "function", "name": "f", "content": "x"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}],
        },
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]},
        {"role": "system", "content": [{"type": "image_url", "image_url": {"url": "https://x.example/i.png"}}]},
        "text",
    ],
)
async def test_messages_that_the_wire_has_no_words_for_are_refused(wire: Wire, message: Any) -> None:
    with pytest.raises(ProviderRejected):
        await hear(wire.provider(), make_job({"messages": [message, {"role": "user", "content": "x"}]}))
    assert wire.server.seen == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("status", "type_", "fault"),
    [
        (400, "invalid_request_error", ProviderRejected),
        (401, "authentication_error", ProviderAuth),
        (402, "billing_error", ProviderAuth),
        (403, "permission_error", ProviderAuth),
        (404, "not_found_error", ProviderRejected),
        (413, "request_too_large", ProviderRejected),
        (429, "rate_limit_error", ProviderRateLimited),
        (500, "api_error", ProviderFailed),
        (504, "timeout_error", ProviderTimeout),
        (529, "overloaded_error", ProviderFailed),
    ],
)
async def test_an_error_is_told_by_its_status(
    wire: Wire, stream: bool, status: int, type_: str, fault: type[Fault]
) -> None:
    wire.server.script(status=status, body=error_of(wire, status, type_=type_, message="secret of acct-17"))
    with pytest.raises(Fault) as caught:
        await hear(wire.provider(), make_job(asking(stream=stream)))
    assert type(caught.value) is fault
    assert caught.value.status == status
    assert ("acct-17" in caught.value.message) == (fault is ProviderRejected)
    assert len(wire.server.seen) == 1, "nobody beneath us retries"


async def test_a_rate_limit_says_how_long_to_wait(wire: Wire) -> None:
    wire.server.script(status=429, body=error_of(wire, 429, type_="rate_limit_error"), headers={"retry-after": "7"})
    with pytest.raises(ProviderRateLimited) as caught:
        await hear(wire.provider(), make_job(asking(stream=True)))
    assert caught.value.retry_after_s == 7.0


async def test_googles_word_for_a_wrong_key_is_an_error_of_ours_and_not_the_clients(wire: Wire) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
    wire.server.script(status=400, body=error_of(wire, 400, type_="invalid_argument", details=details))
    with pytest.raises(Fault) as caught:
        await hear(wire.provider(), make_job(asking()))
    assert isinstance(caught.value, ProviderAuth) == (wire.name == "google")


async def test_an_error_in_the_middle_of_a_stream_ends_it(wire: Wire) -> None:
    error = error_of(wire, 503, type_="overloaded_error")["error"]
    wire.server.script(tokens=5, error_at=2, error=error)
    with pytest.raises(ProviderFailed):
        await hear(wire.provider(), make_job(asking(stream=True)))


@pytest.mark.parametrize("cut", [{"cut_at": 2}, {"end_at": 2}])
async def test_a_stream_that_ends_early_is_no_success(wire: Wire, cut: dict[str, int]) -> None:
    wire.server.script(tokens=5, **cut)
    with pytest.raises(ProviderFailed):
        await hear(wire.provider(), make_job(asking(stream=True)))


async def test_an_answer_of_another_kind_is_nonsense(wire: Wire) -> None:
    wire.server.script(body=["what"])
    with pytest.raises((ProviderNonsense, ProviderFailed)):
        await hear(wire.provider(), make_job(asking()))


async def test_a_provider_that_is_not_there_is_unreachable(wire: Wire) -> None:
    for stream in (True, False):
        with pytest.raises(ProviderUnreachable):
            await hear(wire.provider(base_url="http://127.0.0.1:1"), make_job(asking(stream=stream)))


async def test_the_worker_limits_how_long_is_waited(wire: Wire) -> None:
    settings = WorkerSettings(first_byte_timeout_s=0.2, idle_timeout_s=0.2)
    for at in (0, 2):
        wire.server.script(tokens=5, stall_at=at)
        with pytest.raises(ProviderTimeout):
            await hear(wire.provider(settings), make_job(asking(stream=True)))
    await eventually(lambda: wire.server.answering == 0, what="the server was told")


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_a_stream_that_nobody_wants_any_more_is_closed_at_the_provider(wire: Wire, how: str) -> None:
    wire.server.script(tokens=100, stall_at=2)
    got = asyncio.Event()

    async def read() -> None:
        async with aclosing(wire.provider().generate(make_job(asking(stream=True)))) as chunks:
            async for chunk in chunks:
                if chunk.tokens:
                    got.set()
                    if how == "close":
                        return

    task = asyncio.create_task(read())
    await got.wait()
    watch = Stopwatch()
    if how == "cancel":
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: wire.server.seen[-1].gone, what="the server sees that its client left")
    assert watch.s < CANCEL_MAX_S


async def test_a_whole_answer_that_nobody_waits_for_is_closed_at_the_provider(wire: Wire) -> None:
    wire.server.script(tokens=1, stall_at=0)
    task = asyncio.create_task(hear(wire.provider(), make_job(asking())))
    await eventually(lambda: wire.server.answering == 1, what="the request is there")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: wire.server.seen[-1].gone, what="the server sees that its client left")


async def test_several_answers_run_at_once_over_connections_that_are_used_again(wire: Wire) -> None:
    wire.server.script(tokens=5, pace_s=0.01)
    provider = wire.provider(max_concurrency=8)
    for _ in range(2):
        heard = await asyncio.gather(*(hear(provider, make_job(asking(stream=True))) for _ in range(8)))
        assert {each.text for each in heard} == {"w0 w1 w2 w3 w4"}
    assert wire.server.connections <= 8


def test_without_the_library_the_set_up_says_what_to_install() -> None:
    program = """
import sys
sys.modules["any_llm"] = None
from schemas.errors import SetupError
from schemas.settings import RouteSettings, WorkerSettings
from workers.providers import make_provider
try:
    make_provider(RouteSettings(id="r", provider="anthropic"), WorkerSettings())
except SetupError as error:
    print(error.message)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'penstock[wires]'" in said
    assert "anthropic-compatible" in said


def test_the_library_is_not_imported_before_a_route_wants_it() -> None:
    program = "import sys, workers.providers; print({'any_llm', 'anthropic', 'openai', 'httpx'} & sys.modules.keys())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
