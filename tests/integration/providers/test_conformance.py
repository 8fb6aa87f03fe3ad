"""What every provider promises, whatever is behind it."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from typing import Any

import pytest

from schemas.errors import Fault
from tests.factories import make_job
from tests.integration.providers.conftest import SLOW_TOKENS_PER_S, SetUp
from tests.integration.providers.heard import hear
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

TEXT = "Grüße, 世界! A fox 🦊\nand\ttwo  spaces"
OURS = {"id", "object", "created", "model", "usage"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CANCEL_MAX_S = 0.1


def asking(text: str = TEXT, **members: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **members}


BODIES: dict[str, dict[str, Any]] = {
    "text": asking(),
    "empty": asking(""),
    "several choices": asking(n=3),
    "stop": asking(stop=["two", "fox"]),
    "limit": asking(max_tokens=3),
    "newer limit": asking(max_completion_tokens=2),
    "tools": asking("weather?", tools=[WEATHER], mock={"arguments": '{"city": "Graz"}'}),
    "schema": asking(
        "x",
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": {"type": "object"}}},
        mock={"text": "{}"},
    ),
    "unknown fields": asking(something_new={"a": [1.50, None]}, seed=7),
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    },
}


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BODIES[request.param]


@pytest.mark.parametrize("stream", [True, False])
async def test_chunks_are_objects_with_choices_and_without_what_is_the_ingresss(
    setup: SetUp, body: dict[str, Any], stream: bool
) -> None:
    heard = await hear(setup.provider, make_job({**body, "stream": stream}))
    for piece in heard.pieces:
        members = json.loads(piece)
        assert isinstance(members["choices"], list)
        assert not OURS & members.keys()


async def test_stream_opens_with_the_role_and_each_choice_finishes_once(setup: SetUp, body: dict[str, Any]) -> None:
    heard = await hear(setup.provider, make_job({**body, "stream": True}))
    assert sorted(heard.voices) == list(range(body.get("n", 1)))
    for voice in heard.voices.values():
        assert voice.role == "assistant"
        assert len(voice.finish) == 1
    assert [chunk.finish_reason for chunk in heard.chunks if chunk.finish_reason] == heard.voices[0].finish


async def test_stream_ends_with_its_usage(setup: SetUp, body: dict[str, Any]) -> None:
    heard = await hear(setup.provider, make_job({**body, "stream": True}))
    (last,) = heard.usages
    assert last is heard.chunks[-1]
    assert all(json.loads(piece)["choices"] for piece in last.pieces)  # the report itself is no piece of the answer
    raw = json.loads(last.usage_raw or b"")
    assert last.usage is not None
    assert (raw["prompt_tokens"], raw["completion_tokens"]) == (last.usage.prompt_tokens, last.usage.completion_tokens)


async def test_answer_without_streaming_is_one_chunk_with_everything(setup: SetUp, body: dict[str, Any]) -> None:
    heard = await hear(setup.provider, make_job({**body, "stream": False}))
    (chunk,) = heard.chunks
    assert chunk.members is not None
    assert chunk.usage is not None
    assert chunk.tokens == chunk.usage.completion_tokens
    assert chunk.finish_reason == heard.voices[0].finish[0]


async def test_stream_says_the_same_as_the_answer_without_streaming(setup: SetUp, body: dict[str, Any]) -> None:
    streamed = await hear(setup.provider, make_job({**body, "stream": True}))
    whole = await hear(setup.provider, make_job({**body, "stream": False}))
    assert streamed.voices == whole.voices
    assert streamed.usages[0].usage == whole.usages[0].usage


async def test_tokens_of_the_chunks_add_up_to_about_the_usage(setup: SetUp, body: dict[str, Any]) -> None:
    heard = await hear(setup.provider, make_job({**body, "stream": True}))
    usage = heard.usages[0].usage
    assert usage is not None
    assert abs(heard.tokens - usage.completion_tokens) <= len(heard.voices)  # a call's name may count or not


async def test_text_comes_through_untouched(setup: SetUp) -> None:
    heard = await hear(setup.provider, make_job(asking(stream=True)))
    assert heard.text == TEXT
    assert heard.voices[0].finish == ["stop"]


async def test_every_choice_is_answered(setup: SetUp) -> None:
    heard = await hear(setup.provider, make_job(asking(n=3, stream=True)))
    assert [voice.text for voice in heard.voices.values()] == [TEXT] * 3


async def test_stop_ends_the_text_before_it(setup: SetUp) -> None:
    heard = await hear(setup.provider, make_job(asking(stop=["two", "🦊"], stream=True)))
    assert heard.text == TEXT[: TEXT.index("🦊")]
    assert heard.voices[0].finish == ["stop"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_limit_ends_the_text_with_length(setup: SetUp, name: str) -> None:
    heard = await hear(setup.provider, make_job(asking("one two three", stream=True, **{name: 2})))
    assert heard.text == "one two"
    assert heard.voices[0].finish == ["length"]
    assert heard.usages[0].usage is not None
    assert heard.usages[0].usage.completion_tokens == 2


async def test_tool_call_comes_in_pieces_that_make_valid_arguments(setup: SetUp) -> None:
    heard = await hear(setup.provider, make_job({**BODIES["tools"], "stream": True}))
    ((name, arguments),) = heard.voices[0].called
    assert name == "get_weather"
    assert isinstance(json.loads(arguments)["city"], str)
    assert heard.voices[0].calls[0]["type"] == "function"
    assert heard.voices[0].finish == ["tool_calls"]


async def test_sixty_four_streams_at_once_do_not_mix(setup: SetUp) -> None:
    jobs = [make_job(asking(f"this is number {number}", stream=True)) for number in range(64)]
    heard = await asyncio.gather(*(hear(setup.provider, job) for job in jobs))
    assert [each.text for each in heard] == [f"this is number {number}" for number in range(64)]


async def test_a_slow_stream_comes_token_by_token(setup: SetUp) -> None:
    began = time.monotonic()
    job = make_job({**asking("a b c d e f g h i j"), **setup.slowly, "stream": True})
    came = [time.monotonic() - began async for chunk in setup.slow.generate(job) if chunk.tokens]
    assert len(came) == 10
    assert came[-1] >= 9.5 / SLOW_TOKENS_PER_S
    assert came[0] < came[-1] / 2


async def _first_token(setup: SetUp) -> Any:
    chunks = setup.slow.generate(make_job({**asking("word " * 1000), **setup.slowly, "stream": True}))
    async for chunk in chunks:
        if chunk.tokens:
            return chunks
    raise AssertionError("no token came")


async def test_closing_the_stream_stops_the_work_at_once(setup: SetUp) -> None:
    chunks = await _first_token(setup)
    watch, began = Stopwatch(), time.monotonic()
    await chunks.aclose()
    assert watch.s < CANCEL_MAX_S
    await eventually(lambda: setup.answering() == 0, timeout_s=1)
    if setup.mock is not None:
        gone_s = setup.mock.seen[-1].gone_s
        assert gone_s is not None
        assert gone_s - began - watch.waited_s < CANCEL_MAX_S
        assert setup.mock.connections_open == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_the_task_stops_the_work_at_once(setup: SetUp, stream: bool) -> None:
    """The task waits for the provider when it is cancelled: for the first byte or for the next."""

    async def listen() -> None:
        job = make_job({**asking("word " * 1000), **setup.slowly, "stream": stream})
        async with aclosing(setup.slow.generate(job)) as chunks:  # type: ignore[type-var]
            async for _ in chunks:
                pass

    task = asyncio.create_task(listen())
    await eventually(lambda: setup.mock is None or setup.mock.tokens_sent > 1)
    watch, began = Stopwatch(), time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert watch.s < CANCEL_MAX_S
    await eventually(lambda: setup.answering() == 0, timeout_s=1)
    if setup.mock is not None:
        gone_s = setup.mock.seen[-1].gone_s
        assert gone_s is not None
        assert gone_s - began - watch.waited_s < CANCEL_MAX_S


async def test_a_cancelled_stream_costs_the_next_one_nothing(setup: SetUp) -> None:
    for _ in range(80):  # more than there are connections
        await (await _first_token(setup)).aclose()
    assert (await hear(setup.provider, make_job(asking(stream=True)))).text == TEXT


@pytest.mark.parametrize("body", [b"", b"[]", b"not json", b'{"messages": 7', b'"x"'])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_body_that_is_no_request_is_a_fault_and_nothing_else(setup: SetUp, body: bytes, stream: bool) -> None:
    with pytest.raises(Fault):
        await hear(setup.provider, make_job(body, stream=stream))


async def test_models_are_named(setup: SetUp) -> None:
    names = await setup.provider.models()
    assert names
    assert all(isinstance(name, str) for name in names)


async def test_closing_twice_is_closing_once(setup: SetUp) -> None:
    await hear(setup.provider, make_job(asking(stream=True)))
    await setup.provider.aclose()
    await setup.provider.aclose()
    if setup.mock is not None:
        await eventually(lambda: setup.mock is not None and setup.mock.connections_open == 0)


async def test_nothing_is_left_running(setup: SetUp) -> None:
    before = asyncio.all_tasks()
    for stream in (True, False):
        await hear(setup.provider, make_job(asking(stream=stream)))
    await (await _first_token(setup)).aclose()
    await setup.provider.aclose()
    await eventually(lambda: asyncio.all_tasks() == before)
