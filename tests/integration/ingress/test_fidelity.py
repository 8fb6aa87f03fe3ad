"""What nobody here has heard of passes untouched, both ways."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
import pytest

from tests.integration.ingress.gateway import MODEL, UPSTREAM_MODEL, Gateway, Lines, bearer, body, sdk
from tests.mock_provider import MockProvider

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True}}
UNKNOWN: dict[str, Any] = {
    "x_future": {"nested": [1, 2.50, None, "ü", {"deep": True}]},
    "another": 12345678901234567890,
    "provider_options": {"only": ["a"], "order": None},
}


async def _post(session: aiohttp.ClientSession, gateway: Gateway, raw: bytes) -> tuple[int, Any]:
    headers = {**bearer(), "content-type": "application/json"}
    async with session.post(gateway.chat_url, data=raw, headers=headers) as response:
        return response.status, msgspec.json.decode(await response.read())


@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_fields_reach_the_provider_untouched(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    sent = body(stream=stream, temperature=0.7, seed=7, **UNKNOWN)
    async with Lines(session, gateway.chat_url, sent) as answer:
        await answer.rest()
    got = mock.seen[-1].body
    expected = {**sent, "model": UPSTREAM_MODEL}
    if stream:
        expected["stream_options"] = {"include_usage": True}
    assert got == expected


async def test_numbers_and_strings_reach_the_provider_as_they_were_written(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """Decoding and encoding again would turn 1.0 into 1, 1e2 into 100.0 and escapes into letters."""
    message = rb'[{"role":"user","content":"caf\u00e9 \ud83d\ude00","weight":1.00}]'
    raw = b'{"model":"%b","messages":%b,"top_p":1.0,"x":1e2,"big":123456789012345678901234567890}' % (
        MODEL.encode(),
        message,
    )
    status, _ = await _post(session, gateway, raw)
    assert status == 200
    for part in (message, b'"top_p":1.0', b'"x":1e2', b'"big":123456789012345678901234567890'):
        assert part.decode() in mock.seen[-1].raw


async def test_the_model_is_renamed_upstream_and_back(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        chunks = await stream.chunks()
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        whole = await response.json()
    assert [seen.body["model"] for seen in mock.seen] == [UPSTREAM_MODEL, UPSTREAM_MODEL]
    assert {chunk["model"] for chunk in chunks} == {whole["model"]} == {MODEL}
    assert UPSTREAM_MODEL not in msgspec.json.encode([chunks, whole]).decode()


@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_members_of_the_answer_reach_the_client(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    mock.script(extra={"x_provider": {"cost": 0.001}, "service_tier": "flex"})
    async with Lines(session, gateway.chat_url, body(stream=stream)) as answer:
        found = await answer.chunks() if stream else [msgspec.json.decode(event) for event in await answer.rest()]
    assert found
    for each in found:
        assert each["x_provider"] == {"cost": 0.001}
        assert each["service_tier"] == "flex"
        assert each["system_fingerprint"] == "fp_mock"


async def test_the_clients_stream_options_travel_with_usage_added(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    options = {"include_obfuscation": False, "x_option": 1}
    async with Lines(session, gateway.chat_url, body(stream=True, stream_options=options)) as stream:
        chunks = await stream.chunks()
    assert mock.seen[-1].body["stream_options"] == {**options, "include_usage": True}
    assert not any("usage" in chunk for chunk in chunks)
    assert (await gateway.ending(stream.request_id))["usage"]["completion_tokens"] == 3


async def test_tool_calls_pass_streamed_and_whole(gateway: Gateway, mock: MockProvider) -> None:
    arguments = '{"city": "Paris", "days": [1, 2, 3]}'
    mock.script(arguments=arguments)
    messages: Any = [{"role": "user", "content": "weather?"}]
    tools: Any = [TOOL]
    async with sdk(gateway.base_url) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=messages, tools=tools)
        stream = await client.chat.completions.create(model=MODEL, messages=messages, tools=tools, stream=True)
        streamed, ids, reasons = "", [], []
        async for chunk in stream:
            choice = chunk.choices[0]
            reasons.append(choice.finish_reason)
            for delta in choice.delta.tool_calls or []:
                ids.append(delta.id)
                assert delta.function is not None
                streamed += delta.function.arguments or ""
    assert whole.choices[0].message.tool_calls is not None
    (call,) = whole.choices[0].message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert call.function.arguments == streamed == arguments
    assert whole.choices[0].finish_reason == reasons[-1] == "tool_calls"
    assert ids[0] == "call_mock"
    assert not any(ids[1:])
    assert mock.seen[-1].body["tools"] == [TOOL]


async def test_reasoning_passes(gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession) -> None:
    mock.script(reasoning="let me think")
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        chunks = await stream.chunks()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "let me think"
    event = await gateway.ending(stream.request_id)
    assert event["usage"] == {"prompt_tokens": 10, "completion_tokens": 6, "cached_tokens": 5, "reasoning_tokens": 3}


LOGPROBS = {
    "content": [
        {"token": "é", "logprob": -0.10, "bytes": [195, 169], "top_logprobs": [{"token": "e", "logprob": -9999.0}]}
    ],
    "refusal": None,
    "x_future": 1,
}


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_pass_as_the_provider_wrote_them(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    said = {"delta": {"content": "é"}} if stream else {"message": {"role": "assistant", "content": "é"}}
    choice = {"index": 0, **said, "logprobs": LOGPROBS, "finish_reason": "stop"}
    encoded = msgspec.json.encode({"id": "x", "object": "o", "created": 1, "model": "m", "choices": [choice]})
    if stream:
        mock.script(raw=f"data: {encoded.decode()}\n\ndata: [DONE]\n\n")
    else:
        mock.script(body=encoded.decode())
    async with Lines(session, gateway.chat_url, body(stream=stream, logprobs=True)) as answer:
        (event, *_) = await answer.rest()
    assert msgspec.json.encode(LOGPROBS) in event
    assert msgspec.json.decode(event.removeprefix(b"data: "))["choices"] == [choice]


async def test_an_answer_with_every_hostile_character_stays_whole(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    text = 'a"b\\c\u2028\u2029\u0000\u001f\r\n\ndata: [DONE]\n\n{"error":1}\U0001f600</script>'
    mock.script(text=text)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        chunks = await stream.chunks()
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        whole = await response.json()
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    assert whole["choices"][0]["message"]["content"] == text


async def test_a_providers_own_padding_is_not_sent_on_beside_ours(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """OpenAI pads its chunks too: a member written twice is no JSON that strict readers take."""
    mock.script(extra={"obfuscation": "upstream"})
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        events = await stream.rest()
    assert events
    assert not any(event.count(b'"obfuscation"') > 1 for event in events)


@pytest.mark.parametrize("quirk", ["crlf", "comments", "bom", "no_space", "multi_line", "no_blank_at_end", "together"])
async def test_however_the_provider_writes_its_stream_ours_is_the_same(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, quirk: str
) -> None:
    mock.script(**{quirk: True})
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        chunks = await stream.chunks()
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "one two three"
