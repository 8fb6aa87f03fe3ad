"""The SDK at Penstock gets what the SDK at the engine gets: every way of asking, every kind of answer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.vllm.asking import AS_SCHEMA, LONG, WITH_USAGE, answer, ask, check_form, endless, joined, usage
from tests.vllm.engine import MODEL, RUNNING, SLOTS, Engine
from tests.vllm.tiny_model import AS_JSON, CONVERSATIONS, COUNT, HELLO, PARIS, ROME_AND_OSLO, THINK, Conversation
from tests.waiting import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.timeout(300)]

NAMED = {"type": "function", "function": {"name": "get_weather"}}
VARIED = {"temperature": 2.0, "seed": 7, "max_tokens": 24}
ASKED: dict[str, dict[str, Any]] = {
    **{conversation.question: ask(conversation) for conversation in CONVERSATIONS},
    "max_tokens": ask(COUNT, max_tokens=5),
    "max_completion_tokens": ask(COUNT, max_completion_tokens=5),
    "stop": ask(COUNT, stop=[" five", "nothing"]),
    "seed": ask(HELLO, **VARIED),
    "n": ask(HELLO, **VARIED, n=2),
    "json_schema": ask(AS_JSON, response_format=AS_SCHEMA),
    "tool_choice named": ask(PARIS, tool_choice=NAMED),
    "tool_choice required": ask(PARIS, tool_choice="required"),
    "tool_choice none": ask(PARIS, tool_choice="none"),
    "reasoning": ask(THINK, reasoning_effort="low"),
    "fields that only the engine knows": ask(HELLO, max_tokens=30, extra_body={"ignore_eos": True, "min_tokens": 5}),
}
LEAVES = 20
FREED_MAX_S = 0.05  # in the median; one in twenty may meet a busy machine
LEFT_MAX_S = 3.0
every_way = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
every_answer = pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda c: c.question)


@every_way
def test_answer_is_the_engines(client: OpenAI, direct: OpenAI, asked: dict[str, Any]) -> None:
    ours, engines = client.chat.completions.create(**asked), direct.chat.completions.create(**asked)
    assert answer(ours) == answer(engines)
    assert usage(ours) == usage(engines)
    assert ours.model == MODEL
    assert ours.object == "chat.completion"


@every_way
def test_stream_is_the_engines(client: OpenAI, direct: OpenAI, asked: dict[str, Any]) -> None:
    ours = list(client.chat.completions.create(**asked, **WITH_USAGE))
    engines = list(direct.chat.completions.create(**asked, **WITH_USAGE))
    check_form(ours, with_usage=True)
    assert joined(ours) == joined(engines)
    assert usage(ours[-1]) == usage(engines[-1])


@every_answer
async def test_async_answer_is_the_engines(
    async_client: AsyncOpenAI, direct: OpenAI, conversation: Conversation
) -> None:
    ours = await async_client.chat.completions.create(**ask(conversation))
    engines = direct.chat.completions.create(**ask(conversation))
    assert answer(ours) == answer(engines)
    assert usage(ours) == usage(engines)


@every_answer
async def test_async_stream_is_the_engines(
    async_client: AsyncOpenAI, direct: OpenAI, conversation: Conversation
) -> None:
    ours = await collected(async_client, ask(conversation, **WITH_USAGE))
    engines = list(direct.chat.completions.create(**ask(conversation, **WITH_USAGE)))
    check_form(ours, with_usage=True)
    assert joined(ours) == joined(engines)
    assert usage(ours[-1]) == usage(engines[-1])


def test_stream_has_no_usage_unless_asked(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ask(COUNT), stream=True))
    check_form(chunks, with_usage=False)
    assert joined(chunks)[0]["content"] == COUNT.answer


def test_stream_begins_while_the_engine_still_writes(client: OpenAI, engine: Engine) -> None:
    with client.chat.completions.create(**endless(COUNT, tokens=LONG), stream=True) as stream:
        begun = [next(stream) for _ in range(3)]
        assert engine.metric(RUNNING) == 1
    assert COUNT.answer.startswith(joined(begun)[0]["content"])


def test_tool_calls_are_of_use_to_a_program(client: OpenAI) -> None:
    message = client.chat.completions.create(**ask(ROME_AND_OSLO)).choices[0].message
    assert message.content == "I look.\n"
    assert [json.loads(call.function.arguments) for call in message.tool_calls or ()] == [
        {"city": "Rome"},
        {"city": "Oslo"},
    ]


def test_json_schema_binds_a_model_that_would_say_something_else(client: OpenAI) -> None:
    completion = client.chat.completions.create(**ask(HELLO, response_format=AS_SCHEMA, max_tokens=100))
    said = json.loads(completion.choices[0].message.content or "")
    assert isinstance(said["city"], str)
    assert isinstance(said["celsius"], int)


def test_logprobs_are_the_engines(client: OpenAI, direct: OpenAI) -> None:
    asked = ask(HELLO, logprobs=True, top_logprobs=3)
    ours, engines = (c.chat.completions.create(**asked).choices[0].logprobs for c in (client, direct))
    assert ours is not None
    assert engines is not None
    assert [part.token for part in ours.content or ()] == [part.token for part in engines.content or ()]
    assert [p.logprob for p in ours.content or ()] == pytest.approx(
        [p.logprob for p in engines.content or ()], abs=1e-3
    )
    assert all(len(part.top_logprobs) == 3 for part in ours.content or ())


def test_stream_carries_logprobs_of_every_token(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ask(HELLO, logprobs=True), **WITH_USAGE))
    parts = [p for chunk in chunks for c in chunk.choices if c.logprobs for p in c.logprobs.content or ()]
    assert "".join(part.token for part in parts).startswith(HELLO.answer)
    assert len(parts) == usage(chunks[-1])[1]


def test_stream_carries_fields_that_only_the_engine_knows(client: OpenAI) -> None:
    """But for token ids, which are Penstock's own affair, also where a client asks for them."""
    asked = ask(COUNT, stop=[" five"], extra_body={"return_token_ids": True})
    chunks = list(client.chat.completions.create(**asked, **WITH_USAGE))
    assert [c.model_extra["stop_reason"] for chunk in chunks for c in chunk.choices if c.finish_reason] == [" five"]
    assert not any("token_ids" in chunk.model_dump_json() for chunk in chunks)


def test_same_seed_gives_the_same_answer_and_another_seed_another(client: OpenAI) -> None:
    first, again, other = (
        client.chat.completions.create(**ask(HELLO, **{**VARIED, "seed": seed})).choices[0].message.content
        for seed in (7, 7, 8)
    )
    assert first == again != other


async def test_streams_beside_each_other_are_each_their_own(async_client: AsyncOpenAI, direct: OpenAI) -> None:
    """More than the engine has slots for. Taught answers only: what comes after them is garbage, and how the engine's parser
    of tool calls reads that depends on how many tokens come at once."""
    asked = [ask(conversation, **WITH_USAGE) for conversation in CONVERSATIONS * 4]
    assert len(asked) > SLOTS
    streams = await asyncio.gather(*(collected(async_client, one) for one in asked))
    for one, ours in zip(asked, streams, strict=True):
        engines = list(direct.chat.completions.create(**one))
        check_form(ours, with_usage=True)
        assert joined(ours) == joined(engines)
        assert usage(ours[-1]) == usage(engines[-1])


async def test_streams_run_at_the_same_time(async_client: AsyncOpenAI, engine: Engine) -> None:
    """As many as the engine has slots for: none waits in Penstock for another to end."""
    asked = endless(COUNT, tokens=LONG, stream=True)
    streams = await asyncio.gather(*(async_client.chat.completions.create(**asked) for _ in range(SLOTS)))
    await eventually(lambda: engine.metric(RUNNING) == SLOTS, what="a full engine")
    await asyncio.gather(*(stream.close() for stream in streams))
    await eventually(lambda: engine.metric(RUNNING) == 0, what="a free engine")


def test_leaving_frees_the_engines_slot_at_once(client: OpenAI, engine: Engine) -> None:
    """From the client's closing of its connection to the engine's own count of what it runs, through all of Penstock."""
    freed_s = []
    for _ in range(LEAVES):
        stream = client.chat.completions.create(**endless(COUNT, tokens=LONG), stream=True)
        next(stream)
        assert engine.metric(RUNNING) == 1
        left_at = time.monotonic()
        stream.close()
        while engine.metric(RUNNING):
            assert time.monotonic() - left_at < LEFT_MAX_S
        freed_s.append(time.monotonic() - left_at)
    told = ", ".join(f"{each * 1000:.1f}" for each in freed_s)
    sys.stdout.write(f"freed after ms: {told}\n")
    assert sorted(freed_s)[LEAVES // 2] < FREED_MAX_S, told


async def collected(client: AsyncOpenAI, asked: dict[str, Any]) -> list[ChatCompletionChunk]:
    return [chunk async for chunk in await client.chat.completions.create(**asked)]
