"""A client that leaves stops the work, down to the provider's connection, and pays for what it got."""

from __future__ import annotations

import asyncio
import statistics
import time
from functools import partial
from typing import Any

import aiohttp
import msgspec
import pytest

from ingress.problems import CLIENT_LEFT_STATUS
from schemas.money import Usage, cost
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    MODEL,
    PRICE,
    Event,
    Gateway,
    Lines,
    OpenGateway,
    Wire,
    bearer,
    body,
    sdk,
)
from tests.measured import measured
from tests.mock_provider import MockProvider, Seen
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

CANCEL_WITHIN_S = 0.1
ROUNDS = 5


pytestmark = pytest.mark.timeout(30)


def _usage(event: Event) -> Usage:
    return msgspec.convert(event["usage"], Usage)


async def _gone(mock: MockProvider, since_s: float) -> float:
    """How long after *since_s* the provider's connection was closed."""
    last: Seen = mock.seen[-1]
    await eventually(lambda: last.gone_s is not None, what="the provider's connection closed")
    assert last.gone_s is not None
    return last.gone_s - since_s


async def test_a_stream_whose_client_leaves_ends_at_the_provider_within_100_ms(
    gateway: Gateway,
    mock: MockProvider,
    session: aiohttp.ClientSession,
) -> None:
    mock.script(tokens=2000, pace_s=0.01)
    took = []
    for _ in range(ROUNDS):
        async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
            for _ in range(5):
                assert await stream.next()
            watch, left_s = Stopwatch(), time.monotonic()
        took.append(await _gone(mock, left_s) - watch.waited_s)
        event = await gateway.ending(stream.request_id)
        assert (event["status"], event["http_status"], event["code"]) == (
            "cancelled",
            CLIENT_LEFT_STATUS,
            "client_left",
        )
        assert event["estimated"] is True
        assert 3 <= event["usage"]["completion_tokens"] <= mock.seen[-1].tokens_sent < 100
        assert event["cost_pico"] == cost(_usage(event), PRICE) > 0
        receipt = await gateway.receipt(stream.request_id)
        assert (receipt["outcome"], receipt["code"]) == ("cancelled", "client_left")
        assert receipt["tokens_sent"] >= event["usage"]["completion_tokens"]
    measured("client_left_to_provider_closed_ms", [round(each * 1000, 1) for each in took])
    assert statistics.median(took) < CANCEL_WITHIN_S


async def test_an_answer_without_streaming_whose_client_leaves_ends_at_the_provider_too(
    gateway: Gateway,
    mock: MockProvider,
) -> None:
    mock.script(tokens=2000, pace_s=0.01)
    took = []
    for _ in range(ROUNDS):
        before = len(mock.seen)
        async with Wire(gateway.base_url) as wire:
            wire.ask(body())
            await eventually(partial(_saying, mock, before))
            watch, left_s = Stopwatch(), time.monotonic()
        took.append(await _gone(mock, left_s) - watch.waited_s)
    measured("client_left_to_provider_closed_ms", [round(each * 1000, 1) for each in took])
    assert statistics.median(took) < CANCEL_WITHIN_S
    await eventually(lambda: len([e for e in gateway.events if e["kind"] == "request.finished"]) == ROUNDS)
    for event in [e for e in gateway.events if e["kind"] == "request.finished"]:
        assert (event["status"], event["http_status"], event["code"]) == (
            "cancelled",
            CLIENT_LEFT_STATUS,
            "client_left",
        )
        assert _usage(event).completion_tokens == 0
        assert _usage(event).prompt_tokens > 0
        assert event["estimated"] is True
        assert event["cost_pico"] == cost(_usage(event), PRICE) > 0


async def test_a_client_that_leaves_before_the_first_token_ends_the_work(gateway: Gateway, mock: MockProvider) -> None:
    mock.script(delay_s=20)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body(stream=True))
        await eventually(lambda: mock.answering == 1)
        watch, left_s = Stopwatch(), time.monotonic()
    assert await _gone(mock, left_s) - watch.waited_s < 5 * CANCEL_WITHIN_S
    event = await gateway.ending()
    assert event["status"] == "cancelled"
    assert _usage(event).completion_tokens == 0


async def test_a_job_whose_client_leaves_the_queue_is_withdrawn_and_costs_nothing(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(slots=1)
    mock.script(tokens=200, pace_s=0.01)
    async with Lines(session, gateway.chat_url, body("first", stream=True)) as first:
        await first.next()
        async with Wire(gateway.base_url) as wire:
            wire.ask(body("second", stream=True))
            await eventually(lambda: len([e for e in gateway.events if e["kind"] == "request.accepted"]) == 2)
            await gateway.jobs_waiting(1)
        await gateway.jobs_waiting(0)
        event = await gateway.ending()
        assert (event["status"], event["code"]) == ("cancelled", "client_left")
        assert _usage(event) == Usage()
        assert event["cost_pico"] == 0
        assert event["estimated"] is False
        assert not gateway.of(event["request_id"], "attempt.started")
        mock.script(tokens=1)
        await first.rest()
    assert [seen.body["messages"][0]["content"] for seen in mock.seen] == ["first"]


def _saying(mock: MockProvider, before: int) -> bool:
    return len(mock.seen) > before and mock.seen[-1].tokens_sent > 3


async def test_a_client_that_leaves_while_it_sends_is_recorded_as_gone(gateway: Gateway) -> None:
    async with Wire(gateway.base_url) as wire:
        wire.head(length=1000)
        wire.send(b'{"model":')
        await eventually(lambda: gateway.ingress.server.state.tasks)
    event = await gateway.ending()
    assert (event["kind"], event["code"], event["http_status"]) == (
        "request.rejected",
        "client_left",
        CLIENT_LEFT_STATUS,
    )
    assert event["key_id"]
    assert [e["kind"] for e in gateway.events] == ["request.rejected"]


async def test_a_client_that_leaves_while_it_sends_to_the_admin_api_is_no_error_of_ours(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    async with Wire(gateway.base_url) as wire:
        wire.send(b"POST /admin/v1/keys HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n")
        wire.send(f"Authorization: Bearer {ADMIN_KEY}\r\n\r\n{{".encode())
        await eventually(lambda: gateway.ingress.server.state.tasks)
    await gateway.quiet()
    assert not caplog.records


async def test_a_client_that_sends_its_next_request_too_early_and_leaves_is_noticed(
    gateway: Gateway, mock: MockProvider, caplog: pytest.LogCaptureFixture
) -> None:
    mock.script(delay_s=20)
    async with Wire(gateway.base_url) as wire:
        wire.ask(body("first"))
        wire.ask(body("second"))
        await eventually(lambda: mock.answering == 1)
        watch, left_s = Stopwatch(), time.monotonic()
    assert await _gone(mock, left_s) - watch.waited_s < 5 * CANCEL_WITHIN_S
    assert (await gateway.ending())["status"] == "cancelled"
    await gateway.quiet()
    assert len(mock.seen) == 1
    assert not caplog.records


async def test_the_sdk_closing_its_stream_and_cancelling_its_call_cancel_the_work(
    gateway: Gateway, mock: MockProvider
) -> None:
    mock.script(tokens=2000, pace_s=0.01)
    messages: Any = [{"role": "user", "content": "hi"}]
    async with sdk(gateway.base_url) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await eventually(lambda: mock.seen[0].gone_s is not None)
        call = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=messages))
        await eventually(lambda: len(mock.seen) == 2)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await eventually(lambda: mock.seen[1].gone_s is not None)
    finished = await eventually(lambda: _at_least(2, [e for e in gateway.events if e["kind"] == "request.finished"]))
    assert [event["status"] for event in finished] == ["cancelled", "cancelled"]


def _at_least(count: int, events: list[Event]) -> list[Event]:
    return events if len(events) >= count else []


async def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    open_gateway: OpenGateway, mock: MockProvider
) -> None:
    """Each request has exactly one end, whenever its client went: between the body and the job, the job and its worker, …"""
    gateway = await open_gateway(slots=4)
    mock.script(tokens=5, pace_s=0.002)

    async def visit(number: int) -> None:
        async with Wire(gateway.base_url) as wire:
            wire.ask(body(stream=number % 2 == 0))
            await wire.writer.drain()
            await asyncio.sleep(number * 0.0004)

    await asyncio.gather(*(visit(number) for number in range(60)))
    await gateway.quiet()
    await gateway.jobs_waiting(0)
    begun = {e["request_id"] for e in gateway.events}
    ends = [e["request_id"] for e in gateway.events if e["kind"] in ("request.finished", "request.rejected")]
    assert sorted(ends) == sorted(begun)
    assert len(begun) > 30  # of the others nothing was read before they went
    async with (
        aiohttp.ClientSession() as session,
        session.post(gateway.chat_url, json=body(), headers=bearer()) as answer,
    ):
        assert answer.status == 200
