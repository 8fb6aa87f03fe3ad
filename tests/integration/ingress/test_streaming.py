"""Streams exactly as the API writes them, byte by byte and through the official SDK."""

from __future__ import annotations

import asyncio
import re

import aiohttp
import openai
import pytest

from ingress.sse import OBFUSCATION_BLOCK
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import (
    CLIENT_KEY,
    MODEL,
    Gateway,
    Lines,
    OpenGateway,
    body,
    sdk,
)
from tests.mock_provider import MockProvider
from tests.waiting import eventually


async def test_all_chunks_have_one_id_created_and_model(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        chunks = await stream.chunks()
    assert len(chunks) > 3
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["id"] == "chatcmpl-" + stream.request_id.replace("-", "")
    assert chunks[0]["model"] == MODEL
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "one two three"


async def test_every_event_has_a_number_and_they_count_from_one(
    gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    asked = body(stream=True, stream_options={"include_usage": True})
    async with Lines(session, gateway.chat_url, asked) as stream:
        events = await stream.rest()
    assert stream.ids == list(range(1, len(events) + 1))


async def test_usage_is_null_until_a_last_chunk_without_choices(
    gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    asked = body(stream=True, stream_options={"include_usage": True})
    async with Lines(session, gateway.chat_url, asked) as stream:
        chunks = await stream.chunks()
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
async def test_no_chunk_has_usage_when_it_was_not_asked_for(
    gateway: Gateway, session: aiohttp.ClientSession, options: dict[str, object] | None
) -> None:
    async with Lines(session, gateway.chat_url, body(stream=True, stream_options=options)) as stream:
        chunks = await stream.chunks()
    assert not any("usage" in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)


async def test_usage_that_the_provider_gave_with_every_chunk_is_shown_once(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(usage="every")
    asked = body(stream=True, stream_options={"include_usage": True})
    async with Lines(session, gateway.chat_url, asked) as stream:
        chunks = await stream.chunks()
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


async def test_a_stream_has_a_usage_chunk_even_when_the_provider_gave_none(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(usage="never")
    asked = body(stream=True, stream_options={"include_usage": True})
    async with Lines(session, gateway.chat_url, asked) as stream:
        chunks = await stream.chunks()
    event = await gateway.ending(stream.request_id)
    assert chunks[-1]["usage"]["completion_tokens"] == event["usage"]["completion_tokens"] == 3
    assert event["estimated"] is True


async def test_chunks_are_obfuscated_to_lengths_that_tell_nothing(
    gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    words = "a bb ccc dddd eeeeeeee ffffffffffffffff"
    async with Lines(session, gateway.chat_url, body(words, stream=True)) as stream:
        events = await stream.rest()
    sizes = [len(event) for event in events[:-1]]
    assert all(b'"obfuscation":"' in event for event in events[:-1])
    assert len({size % OBFUSCATION_BLOCK for size in sizes}) == 1


async def test_obfuscation_is_left_out_when_refused(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    asked = body(stream=True, stream_options={"include_obfuscation": False})
    async with Lines(session, gateway.chat_url, asked) as stream:
        events = await stream.rest()
    assert not any(b"obfuscation" in event for event in events)


async def test_headers_say_who_where_and_how_often(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.rest()
    async with Lines(session, gateway.chat_url, body()) as whole:
        await whole.rest()
    for headers in (stream.headers, whole.headers):
        assert re.fullmatch(
            r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", headers["x-request-id"]
        )
        assert headers["x-penstock-route"] == "mock"
        assert headers["x-penstock-attempts"] == "1"
        assert headers["x-penstock-cache"] == "off"
        assert 0 < float(headers["x-penstock-overhead-ms"]) < 2000
    assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["cache-control"] == "no-cache"
    assert whole.headers["content-type"] == "application/json"
    assert stream.request_id != whole.request_id


async def test_a_waiting_stream_is_kept_alive_by_comments_also_before_the_first_token(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(keep_alive_comment_s=0.05))
    mock.script(delay_s=0.6)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        events = await stream.rest()
    comments = [event == b": keep-alive" for event in events]
    first = comments.index(False)
    assert first >= 2
    assert not any(comments[first:])
    assert events[-1] == b"data: [DONE]"


async def test_a_stream_that_waits_in_the_queue_is_kept_alive_too(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(keep_alive_comment_s=0.05), slots=1)
    mock.script(delay_s=1.5)
    async with Lines(session, gateway.chat_url, body(stream=True)) as first:
        assert await first.next() == b": keep-alive"
        await eventually(lambda: mock.seen, what="the first at the provider")
        mock.script(delay_s=0.1)
        async with Lines(session, gateway.chat_url, body(stream=True)) as second:
            assert await second.next() == b": keep-alive"
            assert len(mock.seen) == 1
            assert (await second.rest())[-1] == b"data: [DONE]"
        assert (await first.rest())[-1] == b"data: [DONE]"


async def test_the_sdk_reads_a_stream_that_pauses(open_gateway: OpenGateway, mock: MockProvider) -> None:
    """A comment amid the events is none: its reader takes an empty line for the end of one as soon as it knows an id."""
    gateway = await open_gateway(ingress=IngressSettings(keep_alive_comment_s=0.05))
    mock.script(tokens=4, pace_s=0.3)
    async with sdk(gateway.base_url) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=body()["messages"], stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "w0 w1 w2 w3"


async def test_the_sdk_reads_a_stream(gateway: Gateway) -> None:
    async with sdk(gateway.base_url) as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "one two three"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


async def test_the_sync_sdk_reads_a_stream_and_an_answer(gateway: Gateway) -> None:
    def ask() -> tuple[str, str | None]:
        with openai.OpenAI(base_url=gateway.base_url, api_key=CLIENT_KEY, max_retries=0) as client:
            messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "a b c"}]
            stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return text, client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content

    assert await asyncio.to_thread(ask) == ("a b c", "a b c")


async def test_an_answer_without_streaming_is_one_object(gateway: Gateway) -> None:
    async with sdk(gateway.base_url) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "one two"}]
        )
    completion = raw.parse()
    assert completion.object == "chat.completion"
    assert completion.model == MODEL
    assert completion.id == "chatcmpl-" + raw.headers["x-request-id"].replace("-", "")
    assert completion.choices[0].message.content == "one two"
    assert completion.usage is not None
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 2


async def test_every_choice_of_several_arrives_whole(gateway: Gateway) -> None:
    async with sdk(gateway.base_url) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "one two"}], n=3, stream=True
        )
        texts = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == ["one two"] * 3


async def test_a_long_stream_arrives_whole_and_in_order(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=3000, together=True)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        chunks = await stream.chunks()
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert text == " ".join(f"w{number}" for number in range(3000))
