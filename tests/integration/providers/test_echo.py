"""Echo as the official SDK would read it, strictly; and its pace."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from schemas.ids import RouteId
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from tests.factories import make_job
from tests.integration.providers.heard import hear
from workers.providers import make_provider
from workers.providers.base import Provider

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "echo"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
BODIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing": {"max_tokens": 0},
    "many": {"n": 3, "logprobs": True, "top_logprobs": 2, "stop": "there"},
    "logprobs alone": {"logprobs": True},
    "tools": {"tools": [TOOL, TOOL], "parallel_tool_calls": True},
    "custom tool": {"tools": [{"type": "custom", "custom": {"name": "c"}}]},
    "functions": {"functions": [{"name": "f"}]},
    "json": {"response_format": {"type": "json_object"}},
    "audio": {"modalities": ["text", "audio"], "audio": {"voice": "x", "format": "wav"}},
}


def echo(**changes: Any) -> Provider:
    return make_provider(RouteSettings(id=RouteId("echo"), provider="echo", **changes), WorkerSettings())


@pytest.mark.parametrize("name", BODIES)
async def test_an_answer_is_valid_for_the_official_sdk(name: str) -> None:
    (chunk,) = (await hear(echo(), make_job(BODIES[name]))).chunks
    usage = json.loads(chunk.usage_raw or b"")
    said = {**HEAD, "object": "chat.completion", **json.loads(chunk.members or b""), "usage": usage}
    completion = ChatCompletion.model_validate(said, strict=True)
    assert completion.usage is not None
    assert completion.usage.total_tokens == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("name", [name for name in BODIES if name != "custom tool"])
async def test_a_stream_is_valid_for_the_official_sdk(name: str) -> None:
    job = make_job({**BODIES[name], "stream": True})
    for chunk in (await hear(echo(), job)).chunks:
        members = json.loads(chunk.members or b'{"choices":[]}')
        usage = json.loads(chunk.usage_raw or b"null")
        ChatCompletionChunk.model_validate(
            {**HEAD, "object": "chat.completion.chunk", **members, "usage": usage}, strict=True
        )


async def test_a_custom_tools_call_streams_in_pieces_like_a_functions() -> None:
    """The SDK's types know no custom calls in streams yet; the API sends them like this."""
    job = make_job({**BODIES["custom tool"], "stream": True})
    chunks = [json.loads(chunk.members or b'{"choices":[{"delta":{}}]}') async for chunk in echo().generate(job)]
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert (calls[0]["type"], calls[0]["custom"]) == ("custom", {"name": "c", "input": ""})
    assert "".join(call["custom"]["input"] for call in calls) == "Hello there"


async def test_logprobs_are_those_of_the_tokens_in_both_modes() -> None:
    body = {"logprobs": True, "top_logprobs": 1, "messages": [{"role": "user", "content": "né oui"}]}
    (whole,) = (await hear(echo(), make_job(body))).chunks
    content = json.loads(whole.members or b"")["choices"][0]["logprobs"]["content"]
    token = {"token": "né", "logprob": 0.0, "bytes": [110, 195, 169]}
    assert content[0] == {**token, "top_logprobs": [token]}
    streamed = []
    for chunk in (await hear(echo(), make_job({**body, "stream": True}))).chunks[:-1]:
        streamed += (json.loads(chunk.members or b"")["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == content


async def test_choices_take_turns_in_a_stream() -> None:
    chunks = (await hear(echo(), make_job({"n": 2, "stream": True}))).chunks[:-1]
    assert [json.loads(chunk.members or b"")["choices"][0]["index"] for chunk in chunks] == [0, 1] * (len(chunks) // 2)


async def test_call_ids_differ_between_turns_and_choices_and_stay_the_same_when_asked_again() -> None:
    async def ids(*earlier: dict[str, Any]) -> list[str]:
        messages = [*earlier, {"role": "user", "content": "f"}]
        heard = await hear(echo(), make_job({"messages": messages, "tools": [TOOL], "n": 2}))
        return [call["id"] for voice in heard.voices.values() for call in voice.calls]

    first, later = await ids(), await ids({"role": "user", "content": "before"})
    assert len({*first, *later}) == 4
    assert first == await ids()


async def test_a_delay_comes_before_the_first_token_and_the_pace_is_kept_after_it() -> None:
    slow = echo(delay_ms=60.0, tokens_per_s=100.0)
    job = make_job({"messages": [{"role": "user", "content": "a b c d e f g h i j"}], "stream": True})
    began = time.monotonic()
    came = [time.monotonic() - began async for chunk in slow.generate(job)]
    assert came[0] >= 0.06
    assert came[-1] >= 0.16


async def test_an_answer_without_streaming_takes_as_long_as_a_stream() -> None:
    began = time.monotonic()
    await hear(echo(tokens_per_s=100.0), make_job({"messages": [{"role": "user", "content": "a b c d e"}]}))
    assert time.monotonic() - began >= 0.05


async def test_at_full_speed_others_get_their_turn() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await hear(echo(), make_job({"messages": [{"role": "user", "content": "word " * 1000}], "stream": True}))
    task.cancel()
    assert turns > 10


async def test_it_serves_echo_or_what_the_configuration_names() -> None:
    assert await echo().models() == ("echo",)
    named = echo(models=(ModelSettings(name="gpt-x", upstream="echo"),))
    assert (named.upstream_model("gpt-x"), named.upstream_model("other")) == ("echo", "other")
