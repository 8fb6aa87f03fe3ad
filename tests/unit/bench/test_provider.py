"""The mock provider as the official SDK sees it, and its count of what it served."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from openai import AsyncOpenAI, BadRequestError

from bench import provider
from bench.provider import MODEL, PROMPT_TOKENS, Stats


@pytest.fixture
async def port() -> AsyncIterator[int]:
    listening = await provider.start(chunks=4, chunk_delay_s=0.001)
    yield listening.sockets[0].getsockname()[1]
    listening.close()


@pytest.fixture
async def client(port: int) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0) as sdk:
        yield sdk


async def raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    return body


async def stats(port: int) -> Stats:
    return msgspec.json.decode(await raw(port, b"GET /stats HTTP/1.1\r\nhost: h\r\n\r\n"), type=Stats)


async def test_a_completion_is_answered_with_usage(client: AsyncOpenAI, port: int) -> None:
    said = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert said.choices[0].message.content == " tok000 tok001 tok002 tok003"
    assert said.usage is not None
    assert said.usage.completion_tokens == 4
    assert await stats(port) == Stats(requests=1, prompt_tokens=PROMPT_TOKENS, completion_tokens=4)


async def test_a_stream_has_one_chunk_a_token_and_its_usage_last(client: AsyncOpenAI, port: int) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks[:4]] == [f" tok00{n}" for n in range(4)]
    assert chunks[4].choices[0].finish_reason == "stop"
    assert chunks[5].choices == []
    assert chunks[5].usage is not None
    assert chunks[5].usage.completion_tokens == 4
    assert len(chunks) == 6
    assert (await stats(port)).completion_tokens == 4


async def test_a_stream_without_include_usage_has_none(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert len(chunks) == 5
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_body_that_is_no_request_is_refused_and_counted(client: AsyncOpenAI, port: int) -> None:
    with pytest.raises(BadRequestError):
        await client.post("/chat/completions", body={"stream": "yes"}, cast_to=object)
    assert await stats(port) == Stats(refused=1)


async def test_requests_on_one_connection_are_answered_in_order(port: int) -> None:
    """A client may send the next request before the last stream is over."""
    body = b'{"stream":true}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request + request)
    for _ in range(2):
        assert b"tok003" in await reader.readuntil(b"0\r\n\r\n")
    writer.close()


async def test_models_are_listed(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
