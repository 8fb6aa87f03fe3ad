"""Streams that are continued after their connection broke: from any event, while they run and for a time after."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ingress.sse import KEEP_ALIVE
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    CLIENT_KEY,
    MODEL,
    Gateway,
    Headers,
    Lines,
    OpenGateway,
    Wire,
    bearer,
    body,
    headers_of,
    sdk,
)
from tests.mock_provider import MockProvider
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)

ASK = {"x-penstock-resume": "30"}


async def resume(
    session: aiohttp.ClientSession, gateway: Gateway, request_id: str, after: int | str | None, key: str = CLIENT_KEY
) -> tuple[int, Headers, bytes]:
    headers = bearer(key) | ({} if after is None else {"Last-Event-ID": str(after)})
    async with session.get(f"{gateway.chat_url}/{request_id}", headers=headers) as answer:
        return answer.status, headers_of(answer), await answer.read()


def code_of(raw: bytes) -> str:
    return str(msgspec.json.decode(raw.rpartition(b"data: ")[2])["error"]["code"])


def events_of(raw: bytes) -> list[bytes]:
    """The events of a stream with their blank lines; comments are left out."""
    return [event + b"\n\n" for event in raw.replace(KEEP_ALIVE, b"").split(b"\n\n")[:-1]]


def ids_of(raw: bytes) -> list[int]:
    return [int(event.split(b"\n")[0].removeprefix(b"id: ")) for event in events_of(raw)]


def text_of(raw: bytes) -> str:
    chunks = [msgspec.json.decode(event.partition(b"data: ")[2]) for event in events_of(raw) if b"[DONE]" not in event]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class Stream(Wire):
    """A stream that is read as it comes, until its connection is broken off."""

    raw = b""
    request_id = ""

    async def begin(self, given: dict[str, Any], **headers: str) -> None:
        self.ask(given, **headers)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200"), head
        found = re.search(r"x-request-id: (\S+)", head)
        assert found
        self.request_id = found[1]

    async def read_events(self, count: int) -> None:
        """Reads until *count* events have come whole."""
        while len(events_of(self.raw)) < count:
            size = int(await self.reader.readline(), 16)
            self.raw += await self.reader.readexactly(size)
            await self.reader.readexactly(2)

    @property
    def last(self) -> int:
        return ids_of(self.raw)[-1]


async def test_a_stream_is_read_again_from_any_of_its_events(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    given = body(stream=True, stream_options={"include_usage": True})
    async with session.post(gateway.chat_url, json=given, headers=bearer()) as answer:
        whole, request_id = await answer.read(), answer.headers["x-request-id"]
    events = events_of(whole)
    assert ids_of(whole) == list(range(1, len(events) + 1))
    for after in range(len(events) + 1):
        status, headers, rest = await resume(session, gateway, request_id, after)
        assert status == 200
        assert b"".join(events[:after]) + rest == whole
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-penstock-replayed"] == "true"
        assert headers["x-request-id"] == request_id
    assert (await resume(session, gateway, request_id, None))[2] == whole
    completion_id = "chatcmpl-" + request_id.replace("-", "")
    assert (await resume(session, gateway, completion_id, 0))[2] == whole
    await eventually(lambda: len(gateway.of(request_id, "request.replayed")) == len(events) + 3)
    told = gateway.of(request_id, "request.replayed")
    assert [event["after"] for event in told] == [*range(len(events) + 1), 0, 0]
    assert len(gateway.of(request_id, "request.finished")) == 1


@pytest.mark.parametrize("cut", [1, 2, 5, 12])
async def test_a_stream_that_was_asked_to_goes_on_and_is_continued_where_it_broke(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, cut: int
) -> None:
    mock.script(tokens=20, pace_s=0.01)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True), **ASK)
        await stream.read_events(cut)
    status, _, rest = await resume(session, gateway, stream.request_id, cut)
    assert status == 200
    whole = b"".join(events_of(stream.raw)[:cut]) + b"".join(events_of(rest))
    assert ids_of(whole) == list(range(1, len(events_of(whole)) + 1))
    assert text_of(whole) == " ".join(f"w{number}" for number in range(20))
    assert rest.endswith(b"data: [DONE]\n\n")
    assert mock.seen[0].gone_s is None
    event = await gateway.ending(stream.request_id)
    assert (event["status"], event["usage"]["completion_tokens"]) == ("completed", 20)


async def test_a_connection_may_break_again_and_again(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=40, pace_s=0.01)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True), **ASK)
        await stream.read_events(1)
    raw = b"".join(events_of(stream.raw)[:1])
    while b"[DONE]" not in raw:
        headers = {**bearer(), "Last-Event-ID": str(ids_of(raw)[-1])}
        async with session.get(f"{gateway.chat_url}/{stream.request_id}", headers=headers) as answer:
            came = b""
            while len(events_of(came)) < 5 and (part := await answer.content.readany()):
                came += part
            raw += b"".join(events_of(came)[:5])
            answer.close()
    assert text_of(raw) == " ".join(f"w{number}" for number in range(40))
    assert len(mock.seen) == 1


async def test_a_stream_whose_client_asked_for_nothing_is_cancelled_at_once_and_tells_how_far_it_came(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=2000, pace_s=0.01)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True))
        await stream.read_events(4)
        watch, left_s = Stopwatch(), time.monotonic()
    await eventually(lambda: mock.seen[0].gone_s is not None)
    assert mock.seen[0].gone_s is not None
    assert mock.seen[0].gone_s - left_s - watch.waited_s < 0.5  # the target is 0.1: test_leaving.py measures it
    event = await gateway.ending(stream.request_id)
    assert event["status"] == "cancelled"
    await gateway.quiet()
    status, _, rest = await resume(session, gateway, stream.request_id, 2)
    assert status == 200
    assert rest.startswith(b"".join(events_of(stream.raw)[2:4]))
    assert code_of(rest) == "request_cancelled"
    assert ids_of(rest) == list(range(3, 3 + len(events_of(rest))))


async def test_a_request_that_nobody_comes_back_to_is_cancelled_when_its_grace_is_over(
    gateway: Gateway, mock: MockProvider
) -> None:
    mock.script(tokens=2000, pace_s=0.01)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True), **{"x-penstock-resume": "1"})
        await stream.read_events(1)
        watch = Stopwatch()
    event = await gateway.ending(stream.request_id)
    assert watch.wall_s > 0.9
    assert watch.s < 5
    assert (event["status"], event["code"]) == ("cancelled", "client_left")
    assert event["usage"]["completion_tokens"] > 20
    await eventually(lambda: mock.seen[0].gone_s is not None)


async def test_a_client_that_comes_back_takes_the_place_of_its_half_open_connection(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """The first connection looks alive; nobody reads it any more. Nothing was asked for."""
    mock.script(tokens=30, pace_s=0.08)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True))
        await stream.read_events(3)
        status, _, rest = await resume(session, gateway, stream.request_id, 3)
        assert status == 200
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ValueError)):
            await stream.read_events(1000)
    whole = b"".join(events_of(stream.raw)[:3]) + rest
    assert text_of(whole) == " ".join(f"w{number}" for number in range(30))
    assert mock.seen[0].gone_s is None
    assert (await gateway.ending(stream.request_id))["status"] == "completed"


async def test_a_kept_connection_of_a_finished_stream_is_not_cut_by_who_reads_it_again(
    gateway: Gateway, session: aiohttp.ClientSession
) -> None:
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=True))
        head = (await wire.reader.readuntil(b"\r\n\r\n")).decode()
        await wire.reader.readuntil(b"\r\n0\r\n\r\n")
        found = re.search(r"x-request-id: (\S+)", head)
        assert found
        assert (await resume(session, gateway, found[1], 0))[0] == 200
        wire.ask(body())
        assert (await wire.answer())[0] == 200


async def test_only_the_key_that_asked_may_read(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.rest()
    for key, request_id in ((ADMIN_KEY, stream.request_id), (CLIENT_KEY, stream.request_id[:-1] + "x")):
        status, _, raw = await resume(session, gateway, request_id, 0, key=key)
        assert (status, code_of(raw)) == (404, "answer_not_found")
    status, _, raw = await resume(session, gateway, stream.request_id, 0, key="sk-nobody")
    assert (status, code_of(raw)) == (401, "invalid_api_key")


async def test_what_can_not_be_continued_is_refused(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.rest()
    last = stream.ids[-1]
    for after in (last + 1, "-1", "x", "1" * 30):
        status, _, raw = await resume(session, gateway, stream.request_id, after)
        assert (status, code_of(raw)) == (400, "invalid_request")
    assert (await resume(session, gateway, stream.request_id, last))[2] == b""
    async with session.post(f"{gateway.chat_url}/{stream.request_id}", headers=bearer()) as answer:
        assert answer.status == 405
        assert "GET" in answer.headers["allow"]
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as answer:
        await answer.read()
        plain = answer.headers["x-request-id"]
    status, _, raw = await resume(session, gateway, plain, None)
    assert (status, code_of(raw)) == (404, "answer_not_found")  # no stream, and nobody asked to keep it
    assert len(mock.seen) == 2


async def test_an_answer_without_a_stream_can_be_fetched_again_but_not_in_part(
    gateway: Gateway, mock: MockProvider
) -> None:
    async with sdk(gateway.base_url) as client:
        first = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "one two"}], extra_headers=ASK
        )
        again: ChatCompletion = await client.chat.completions.retrieve(first.id)
        assert again == first
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.retrieve(first.id, extra_headers={"Last-Event-ID": "1"})
    assert len(mock.seen) == 1


async def test_the_sdk_continues_a_stream(gateway: Gateway, mock: MockProvider) -> None:
    """As docs/clients.md shows it."""
    mock.script(tokens=20, pace_s=0.01)
    async with sdk(gateway.base_url) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True, extra_headers=ASK
        )
        texts, seen = [], 0
        async for chunk in stream:
            seen += 1
            texts.append(chunk.choices[0].delta.content or "")
            if seen == 5:
                await stream.response.aclose()
                break
        rest = await client.get(
            f"/chat/completions/{chunk.id}",
            cast_to=ChatCompletionChunk,
            options={"headers": {"Last-Event-ID": str(seen)}},
            stream=True,
            stream_cls=openai.AsyncStream[ChatCompletionChunk],
        )
        texts += [chunk.choices[0].delta.content or "" async for chunk in rest]
    assert "".join(texts) == " ".join(f"w{number}" for number in range(20))
    assert len(mock.seen) == 1


class CuttingProxy:
    """Forwards TCP to the gateway, and cuts each of the first connections after some bytes of an answer."""

    def __init__(self, base_url: str, *, cuts: list[int]) -> None:
        self._port = int(base_url.split(":")[2].split("/", maxsplit=1)[0])
        self.cuts = cuts

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.cuts.pop(0) if self.cuts else 1 << 30
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def up() -> None:
            while data := await reader.read(65536):
                upstream_writer.write(data)

        sender = asyncio.create_task(up())
        while left > 0 and (data := await upstream_reader.read(min(left, 65536))):
            writer.write(data)
            await writer.drain()
            left -= len(data)
        sender.cancel()
        upstream_writer.transport.abort()
        writer.transport.abort()


def example_of_continuing() -> str:
    """The program in docs/clients.md."""
    page = (Path(__file__).parents[3] / "docs" / "clients.md").read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Last-Event-ID" in block]
    return str(found)


async def test_the_example_of_the_page_gets_the_whole_text_over_a_connection_that_breaks(
    gateway: Gateway, mock: MockProvider
) -> None:
    mock.script(tokens=40, pace_s=0.01)
    program = example_of_continuing().replace("sk-penstock-...", CLIENT_KEY).replace('"echo"', repr(MODEL))
    found: dict[str, Any] = {}
    async with CuttingProxy(gateway.base_url, cuts=[2500, 1900, 3100]) as base_url:
        await asyncio.to_thread(exec, program.replace("http://127.0.0.1:8000/v1", base_url), found)
    assert found["text"] == " ".join(f"w{number}" for number in range(40))
    assert len(mock.seen) == 1
    assert len([event for event in gateway.events if event["kind"] == "request.replayed"]) == 3


async def test_a_retry_with_its_key_continues_after_the_last_event_that_came(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=20, pace_s=0.01)
    async with Stream(gateway.base_url) as stream:
        await stream.begin(body(stream=True), **{"Idempotency-Key": "k"})
        await stream.read_events(5)
    headers = {**bearer(), "Idempotency-Key": "k", "Last-Event-ID": "5"}
    async with session.post(gateway.chat_url, json=body(stream=True), headers=headers) as answer:
        rest = await answer.read()
    assert text_of(b"".join(events_of(stream.raw)[:5]) + rest) == " ".join(f"w{number}" for number in range(20))
    headers["Idempotency-Key"] = "another"
    async with session.post(gateway.chat_url, json=body(stream=True), headers=headers) as answer:
        assert (answer.status, code_of(await answer.read())) == (404, "answer_not_found")
    assert len(mock.seen) == 1


async def test_a_stream_is_kept_for_its_time_and_no_longer(
    open_gateway: OpenGateway, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(resume_s=1.0))
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.rest()
    assert (await resume(session, gateway, stream.request_id, 0))[0] == 200
    await asyncio.sleep(1.05)
    assert (await resume(session, gateway, stream.request_id, 0))[0] == 404


async def test_nothing_is_kept_unasked_where_that_is_turned_off(
    open_gateway: OpenGateway, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(resume_s=0))
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.rest()
    assert (await resume(session, gateway, stream.request_id, 0))[0] == 404


async def test_a_reader_that_stops_reading_holds_nobody_back_and_is_cut_off(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_kept_answer_bytes=2_000_000))
    mock.script(tokens=2_000, pace_s=0.001, extra={"padding": "x" * 6000})  # 12 MB: more than sockets hold
    asked = body(stream=True)
    async with Wire(gateway.base_url) as idle:
        idle.ask(asked, **{"Idempotency-Key": "k"})
        await eventually(lambda: mock.seen)
        async with session.post(gateway.chat_url, json=asked, headers={**bearer(), "Idempotency-Key": "k"}) as answer:
            whole = await answer.read()
        assert text_of(whole).split(" ")[-1] == "w1999"
        assert len(mock.seen) == 1
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await idle.reader.readexactly(len(whole))
    assert (await gateway.ending())["status"] == "completed"


async def test_comments_come_to_whoever_waits_and_have_no_number(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(keep_alive_comment_s=0.05))
    mock.script(delay_s=0.3)
    async with session.post(gateway.chat_url, json=body(stream=True), headers={**bearer(), **ASK}) as answer:
        raw, request_id = await answer.read(), answer.headers["x-request-id"]
    assert raw.count(KEEP_ALIVE) >= 2
    assert raw.rindex(b": keep-alive") < raw.index(b"id: 1\n")
    assert b"keep-alive" not in (await resume(session, gateway, request_id, 0))[2]
