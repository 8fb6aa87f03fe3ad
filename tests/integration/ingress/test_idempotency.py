"""An Idempotency-Key: a retry joins what runs or is told again what was told, and is generated and billed once."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    CLIENT_KEY,
    MODEL,
    Gateway,
    Headers,
    OpenGateway,
    Wire,
    bearer,
    body,
    headers_of,
    sdk,
    slow_to_give_back,
)
from tests.mock_provider import MockProvider
from tests.waiting import eventually

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def keyed(key: str = "order-1", *, api_key: str = CLIENT_KEY, **further: str) -> Headers:
    return {**bearer(api_key), "Idempotency-Key": key, **further}


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, given: dict[str, Any], headers: Headers
) -> tuple[int, Headers, bytes]:
    async with session.post(gateway.chat_url, json=given, headers=headers) as answer:
        return answer.status, headers_of(answer), await answer.read()


def code_of(raw: bytes) -> str:
    return str(msgspec.json.decode(raw.rpartition(b"data: ")[2])["error"]["code"])


def finished(gateway: Gateway) -> list[dict[str, Any]]:
    return [event for event in gateway.events if event["kind"] == "request.finished"]


def replayed(gateway: Gateway) -> list[dict[str, Any]]:
    return [event for event in gateway.events if event["kind"] == "request.replayed"]


@BOTH
async def test_a_retry_is_told_the_same_byte_for_byte_and_costs_nothing(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    given = body(stream=stream, stream_options={"include_usage": True} if stream else None)
    first = await ask(session, gateway, given, keyed())
    again = await ask(session, gateway, given, keyed())
    assert first[0] == again[0] == 200
    assert first[2] == again[2]
    assert len(mock.seen) == 1
    assert again[1].pop("x-penstock-replayed") == "true"
    assert {**first[1], "date": ""} == {**again[1], "date": ""}  # with the id of the first
    await eventually(lambda: replayed(gateway))
    (end,), (told,) = finished(gateway), replayed(gateway)
    assert end["cost_pico"] > 0
    assert (told["request_id"], told["running"], told["by"]) == (end["request_id"], False, "idempotency_key")


@BOTH
async def test_tries_at_the_same_moment_share_one_generation(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    mock.script(tokens=20, pace_s=0.06)
    answers = await asyncio.gather(*(ask(session, gateway, body(stream=stream), keyed()) for _ in range(8)))
    assert {answer[0] for answer in answers} == {200}
    assert len({answer[2] for answer in answers}) == 1
    assert len(mock.seen) == 1
    await eventually(lambda: len(replayed(gateway)) == 7)
    assert len(finished(gateway)) == 1
    assert all(event["running"] for event in replayed(gateway))
    assert len([e for e in gateway.events if e["kind"] == "request.accepted"]) == 1


async def test_the_same_key_with_another_body_is_refused(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    await ask(session, gateway, body("one"), keyed())
    for other in (body("two"), body("one", stream=True)):
        status, _, raw = await ask(session, gateway, other, keyed())
        assert (status, code_of(raw)) == (422, "idempotency_key_reused")
    assert len(mock.seen) == 1
    rejected = [event["code"] for event in gateway.events if event["kind"] == "request.rejected"]
    assert rejected == ["idempotency_key_reused"] * 2


async def test_the_same_idempotency_key_of_another_api_key_is_another(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    first = await ask(session, gateway, body("mine"), keyed())
    other = await ask(session, gateway, body("theirs"), keyed(api_key=ADMIN_KEY))
    assert first[0] == other[0] == 200
    assert "x-penstock-replayed" not in other[1]
    assert len(mock.seen) == 2


@BOTH
async def test_a_retry_joins_the_request_whose_connection_broke(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    mock.script(tokens=30, pace_s=0.02)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=stream), **{"Idempotency-Key": "order-1"})
        await eventually(lambda: mock.seen and mock.seen[0].tokens_sent > 3)
    status, headers, raw = await ask(session, gateway, body(stream=stream), keyed())
    assert status == 200
    assert headers["x-penstock-replayed"] == "true"
    assert b"w0" in raw
    assert b"w29" in raw
    assert len(mock.seen) == 1
    assert mock.seen[0].gone_s is None
    assert [event["status"] for event in finished(gateway)] == ["completed"]


async def test_the_sdks_own_retries_join(gateway: Gateway, mock: MockProvider) -> None:
    """It gives up after its time-out and tries again, with the same headers."""
    mock.script(text="slow but sure", delay_s=1.0)
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=CLIENT_KEY, max_retries=5, timeout=0.4) as client:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            extra_headers={"Idempotency-Key": "order-1"},
        )
    assert answer.choices[0].message.content == "slow but sure"
    assert len(mock.seen) == 1
    assert len(finished(gateway)) == 1


async def test_what_failed_and_cost_nothing_is_tried_again(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(status=500, delay_s=0.2)
    broke = await asyncio.gather(*(ask(session, gateway, body(), keyed()) for _ in range(3)))
    assert {answer[0] for answer in broke} == {502}
    tries = len(mock.seen)
    mock.script(text="now")
    status, headers, raw = await ask(session, gateway, body(), keyed())
    assert status == 200
    assert b"now" in raw
    assert "x-penstock-replayed" not in headers
    assert len(mock.seen) == tries + 1


async def test_what_failed_after_it_was_billed_is_not_tried_again(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=5, error_at=3, pace_s=0.02)
    first = await ask(session, gateway, body(stream=True), keyed())
    mock.script(text="now")
    again = await ask(session, gateway, body(stream=True), keyed())
    assert first[2] == again[2]
    assert code_of(again[2]) == "upstream_error"
    assert len(finished(gateway)) == 1
    assert len(mock.seen) == 1


@BOTH
async def test_a_retry_that_comes_after_the_request_was_cancelled_is_told_so_and_not_billed_again(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    mock.script(tokens=2000, pace_s=0.01)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=stream), **{"Idempotency-Key": "order-1", "x-penstock-resume": "0"})
        await eventually(lambda: mock.seen and mock.seen[0].tokens_sent > 3)
    await eventually(lambda: mock.seen[0].gone_s is not None)
    end = await gateway.ending()
    assert end["status"] == "cancelled"
    assert end["cost_pico"] > 0
    status, _, raw = await ask(session, gateway, body(stream=stream), keyed())
    assert status == (200 if stream else 410)
    assert (b"w0" in raw) is stream
    assert code_of(raw) == "request_cancelled"
    assert len(mock.seen) == len(finished(gateway)) == 1


async def test_the_key_of_a_request_that_was_cancelled_in_the_queue_is_free_again(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes while it is still about to be waits for that."""
    slow_to_give_back(monkeypatch, 0.5)
    gateway = await open_gateway(slots=1)
    mock.script(tokens=3, pace_s=0.5)
    first = asyncio.create_task(ask(session, gateway, body("first"), bearer()))
    await eventually(lambda: mock.answering == 1)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body("second"), **{"Idempotency-Key": "order-1", "x-penstock-resume": "0"})
        await gateway.jobs_waiting(1)
    await gateway.jobs_waiting(0)
    assert (await gateway.ending())["cost_pico"] == 0
    status, headers, _ = await ask(session, gateway, body("second"), keyed())
    assert status == 200
    assert "x-penstock-replayed" not in headers
    await first


@pytest.mark.parametrize(
    "headers",
    [
        {"Idempotency-Key": ""},
        {"Idempotency-Key": "x" * 256},
        {"Idempotency-Key": "clé"},
        {"x-penstock-resume": "61"},
        {"x-penstock-resume": "-1"},
        {"x-penstock-resume": "soon"},
        {"Idempotency-Key": "k", "Last-Event-ID": "last"},
        {"Last-Event-ID": "3"},
    ],
    ids=str,
)
async def test_headers_that_mean_nothing_are_refused(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, headers: Headers
) -> None:
    status, _, raw = await ask(session, gateway, body(), {**bearer(), **headers})
    assert (status, code_of(raw)) == (400, "invalid_request")
    assert any(name.encode() in raw for name in headers)
    assert not mock.seen


async def test_a_key_of_255_characters_is_one(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    assert (await ask(session, gateway, body(), keyed("x" * 255)))[0] == 200


async def test_a_key_is_new_again_when_its_time_is_over(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(idempotency_s=1.0))
    for _ in range(2):
        await ask(session, gateway, body(), keyed())
    assert len(mock.seen) == 1
    await asyncio.sleep(1.05)
    assert "x-penstock-replayed" not in (await ask(session, gateway, body(), keyed()))[1]
    assert len(mock.seen) == 2


@BOTH
async def test_an_answer_too_long_to_be_kept_reaches_its_client_and_is_never_generated_twice(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession, stream: bool
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(max_kept_answer_bytes=20_000))
    mock.script(tokens=10_000 if not stream else 300, pace_s=0.001 if stream else 0)
    status, _, raw = await ask(session, gateway, body(stream=stream), keyed())
    assert status == 200
    assert len(raw) > 40_000
    status, _, raw = await ask(session, gateway, body(stream=stream), keyed())
    assert (status, code_of(raw)) == (410, "answer_not_kept")
    assert len(mock.seen) == 1


async def test_the_sdk_is_told_what_is_wrong(gateway: Gateway) -> None:
    async with sdk(gateway.base_url) as client:
        for content in ("one", "two"):
            call = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": content}],
                extra_headers={"Idempotency-Key": "order-1"},
            )
            if content == "one":
                await call
                continue
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                await call
            assert caught.value.code == "idempotency_key_reused"
