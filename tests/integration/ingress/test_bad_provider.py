"""Whatever a provider does: the client is told in the API's own way, the books say what happened, and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from schemas.money import Usage, cost
from schemas.settings import IngressSettings, WorkerSettings
from tests.integration.ingress.gateway import (
    MODEL,
    PRICE,
    Event,
    Gateway,
    Lines,
    OpenGateway,
    bearer,
    body,
    sdk,
    timeouts,
)
from tests.mock_provider import MockProvider
from tests.waiting import eventually

MESSAGES: Any = [{"role": "user", "content": "one two three four five six"}]
HASTY = WorkerSettings(drain_s=0.2, first_byte_timeout_s=0.2, idle_timeout_s=0.2)
REJECTED = {
    "message": "too long",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}
SECRET = "acct_4711 at internal-host:8080"

Case = tuple[dict[str, Any], type[openai.APIStatusError], int, str]

# What the provider does before anything was delivered; what the client is told.
BEFORE: dict[str, Case] = {
    "400": ({"status": 400, "error": REJECTED}, openai.BadRequestError, 400, "context_length_exceeded"),
    "404": (
        {"status": 404, "error": {"message": "no model", "code": "model_not_found"}},
        openai.NotFoundError,
        404,
        "model_not_found",
    ),
    "422": (
        {"status": 422, "error": {"message": "bad tools"}},
        openai.UnprocessableEntityError,
        422,
        "upstream_rejected",
    ),
    "401": ({"status": 401, "error": {"message": SECRET}}, openai.InternalServerError, 502, "upstream_auth"),
    "403": ({"status": 403, "error": {"message": SECRET}}, openai.InternalServerError, 502, "upstream_auth"),
    "429": (
        {"status": 429, "error": {"message": SECRET}, "headers": {"retry-after": "7"}},
        openai.RateLimitError,
        429,
        "upstream_rate_limited",
    ),
    "500": ({"status": 500, "error": {"message": SECRET}}, openai.InternalServerError, 502, "upstream_error"),
    "503": ({"status": 503, "body": f"<html>{SECRET}"}, openai.InternalServerError, 502, "upstream_error"),
    "302": (
        {"status": 302, "headers": {"location": "http://127.0.0.1:1/"}},
        openai.InternalServerError,
        502,
        "upstream_error",
    ),
    "html": (
        {"body": "<html>", "content_type": "text/html"},
        openai.InternalServerError,
        502,
        "upstream_invalid_response",
    ),
    "reset": ({"reset": True}, openai.InternalServerError, 502, "upstream_unreachable"),
    "stall": ({"stall_at": -1}, openai.InternalServerError, 504, "upstream_timeout"),
}
BEFORE_WHOLE: dict[str, Case] = {
    "not json": ({"body": "nonsense"}, openai.InternalServerError, 502, "upstream_invalid_response"),
    "no choices": ({"body": '{"id": "x"}'}, openai.InternalServerError, 502, "upstream_invalid_response"),
    "empty": ({"body": ""}, openai.InternalServerError, 502, "upstream_invalid_response"),
    "short": ({"short_by": 20}, openai.InternalServerError, 502, "upstream_error"),
    "stall in the body": ({"stall_at": 2}, openai.InternalServerError, 504, "upstream_timeout"),
    "error in a 200": ({"body": '{"error": {"message": "x"}}'}, openai.InternalServerError, 502, "upstream_error"),
}
BEFORE_STREAM: dict[str, Case] = {
    "error first": (
        {"raw": 'data: {"error": {"message": "bad", "type": "invalid_request_error", "code": 400}}\n\n'},
        openai.BadRequestError,
        400,
        "400",
    ),
    "only done": ({"raw": "data: [DONE]\n\n"}, openai.InternalServerError, 502, "upstream_invalid_response"),
    "nothing": ({"raw": ""}, openai.InternalServerError, 502, "upstream_error"),
    "not json": ({"raw": "data: nonsense\n\n"}, openai.InternalServerError, 502, "upstream_invalid_response"),
    "a number": ({"raw": "data: 7\n\n"}, openai.InternalServerError, 502, "upstream_invalid_response"),
}
# What it does after two tokens of a stream.
AMID: dict[str, tuple[dict[str, Any], str]] = {
    "stall": ({"stall_at": 2}, "upstream_timeout"),
    "cut": ({"cut_at": 2}, "upstream_error"),
    "early end": ({"end_at": 2}, "upstream_error"),
    "error": ({"error_at": 2}, "upstream_error"),
    "error as an event": ({"error_at": 2, "error_event": "error", "error_bare": True}, "upstream_error"),
    "gives up": ({"tokens": 2, "finish_reason": "abort"}, "upstream_error"),
}


async def _check_unpaid(gateway: Gateway, request_id: str | None, *, status: int, stream: bool) -> Event:
    event = await gateway.ending(request_id)
    assert (event["kind"], event["status"], event["http_status"]) == ("request.finished", "failed", status)
    assert event["usage"] == {}
    assert event["cost_pico"] == 0
    assert event["estimated"] is False
    assert event["stream"] is stream
    receipt = await gateway.receipt(event["request_id"])
    assert receipt["outcome"] == "failed"
    assert receipt["code"] == event["code"]
    return event


def hasty(script: dict[str, Any]) -> WorkerSettings | None:
    """Short time-outs only where one is waited for: a busy machine needs longer for the rest."""
    return HASTY if "stall_at" in script else None


def _cases(*tables: dict[str, Any]) -> Any:
    return [pytest.param(case, id=name) for table in tables for name, case in table.items()]


@pytest.mark.parametrize("case", _cases(BEFORE, BEFORE_WHOLE))
async def test_a_failure_is_told_to_a_client_that_does_not_stream(
    open_gateway: OpenGateway,
    mock: MockProvider,
    case: Case,
) -> None:
    script, error, status, code = case
    gateway = await open_gateway(worker=hasty(script))
    mock.script(**script)
    async with sdk(gateway.base_url) as client:
        with pytest.raises(error) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert type(caught.value) is error
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert SECRET not in str(caught.value)
    await _check_unpaid(gateway, caught.value.request_id, status=status, stream=False)
    await gateway.quiet()
    mock.script()
    await eventually(lambda: gateway.ingress.fleet.offers(MODEL), what="the route, where its key was refused")
    async with sdk(gateway.base_url) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == "one two three four five six"


@pytest.mark.parametrize("case", _cases(BEFORE, BEFORE_STREAM))
async def test_a_failure_before_the_first_token_is_told_as_a_plain_error(
    open_gateway: OpenGateway,
    mock: MockProvider,
    case: Case,
) -> None:
    script, error, status, code = case
    gateway = await open_gateway(worker=hasty(script))
    mock.script(**script)
    async with sdk(gateway.base_url) as client:
        with pytest.raises(error) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert type(caught.value) is error
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert SECRET not in str(caught.value)
    await _check_unpaid(gateway, caught.value.request_id, status=status, stream=True)


@pytest.mark.parametrize("case", _cases(AMID))
async def test_a_failure_in_the_middle_is_told_inside_the_stream_which_ends_without_done(
    open_gateway: OpenGateway,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    case: tuple[dict[str, Any], str],
) -> None:
    script, code = case
    gateway = await open_gateway(worker=hasty(script))
    mock.script(**script)
    async with Lines(session, gateway.chat_url, body("one two three four", stream=True)) as stream:
        *events, last = await stream.rest()
    assert stream.status == 200
    assert b"[DONE]" not in b"".join([*events, last])
    told = msgspec.json.decode(last.removeprefix(b"data: "))
    assert set(told) == {"error"}
    assert told["error"]["code"] == code
    assert told["error"]["type"] == "server_error"
    delivered = [msgspec.json.decode(e.removeprefix(b"data: "))["choices"][0]["delta"].get("content") for e in events]
    assert len([text for text in delivered if text]) == 2
    event = await gateway.ending(stream.request_id)
    assert (event["status"], event["http_status"], event["code"]) == ("failed", 200, code)
    usage = msgspec.convert(event["usage"], Usage)
    assert usage.completion_tokens == 2
    assert event["estimated"] is True
    assert event["cost_pico"] == cost(usage, PRICE) > 0
    assert (await gateway.receipt(stream.request_id))["tokens_sent"] == 2


async def test_the_sdk_raises_in_the_middle_of_a_stream(open_gateway: OpenGateway, mock: MockProvider) -> None:
    gateway = await open_gateway()
    mock.script(error_at=2)
    got: list[str] = []
    async with sdk(gateway.base_url) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError) as caught:
            await _read(stream, got)
    assert "".join(got) == "one two"
    assert type(caught.value) is openai.APIError
    assert (caught.value.code, caught.value.type) == ("upstream_error", "server_error")


async def _read(stream: openai.AsyncStream[ChatCompletionChunk], into: list[str]) -> None:
    """What came before the error is wanted too, so it is put *into* a list and not returned."""
    async for chunk in stream:
        text = chunk.choices[0].delta.content
        if text:
            into.append(text)


async def test_a_failure_after_the_role_and_before_any_text_is_a_plain_error_and_costs_nothing(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway()
    mock.script(cut_at=0, pace_s=0.05)
    async with session.post(gateway.chat_url, json=body(stream=True), headers=bearer()) as response:
        told = await response.json()
        assert (response.status, told["error"]["code"]) == (502, "upstream_error")
        request_id = response.headers["x-request-id"]
    event = await gateway.ending(request_id)
    assert (event["status"], event["usage"], event["cost_pico"]) == ("failed", {}, 0)


async def test_a_failure_after_a_comment_is_told_inside_the_stream(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(keep_alive_comment_s=0.05))
    mock.script(status=400, error=REJECTED, delay_s=0.2)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        *comments, last = await stream.rest()
    assert set(comments) == {b": keep-alive"}
    assert msgspec.json.decode(last.removeprefix(b"data: ")) == {"error": REJECTED}
    event = await gateway.ending(stream.request_id)
    assert (event["status"], event["http_status"], event["cost_pico"]) == ("failed", 200, 0)


async def test_when_to_retry_is_passed_on(gateway: Gateway, mock: MockProvider) -> None:
    mock.script(status=429, headers={"retry-after": "7"})
    async with sdk(gateway.base_url) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert caught.value.response.headers["retry-after"] == "7"


async def test_a_provider_that_is_down_is_a_502(gateway: Gateway, mock: MockProvider) -> None:
    await mock.__aexit__()
    async with sdk(gateway.base_url) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_unreachable")
    await _check_unpaid(gateway, caught.value.request_id, status=502, stream=False)


@pytest.mark.parametrize(
    "case",
    [
        ("first_token_s", "first_token_timeout", {"stall_at": -1}),
        ("idle_s", "idle_timeout", {"stall_at": 2}),
        ("total_s", "total_timeout", {"pace_s": 0.05, "tokens": 1000}),
    ],
)
async def test_each_time_out_of_a_request_ends_it_at_the_provider_too(
    open_gateway: OpenGateway,
    mock: MockProvider,
    session: aiohttp.ClientSession,
    case: tuple[str, str, dict[str, Any]],
) -> None:
    """The worker and the ingress both keep the time; whoever is first says the same to the client."""
    limit, code, script = case
    gateway = await open_gateway(ingress=IngressSettings(timeouts=timeouts(**{limit: 0.3})))
    mock.script(**script)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        *_, last = await stream.rest()
    told = msgspec.json.decode(last.removeprefix(b"data: "))
    assert told["error"]["code"] in (code, "upstream_timeout")
    assert stream.status == (504 if limit == "first_token_s" else 200)
    event = await gateway.ending(stream.request_id)
    assert (event["status"], event["code"]) == ("failed", told["error"]["code"])
    await eventually(lambda: mock.seen[-1].gone_s is not None)


async def test_an_answer_larger_than_a_message_may_be_is_delivered_or_refused_but_not_lost(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway()
    mock.script(text="x" * 9_000_000)
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        told = await response.json()
        assert response.status in (200, 502)
        request_id = response.headers["x-request-id"]
    if response.status == 200:
        assert len(told["choices"][0]["message"]["content"]) == 9_000_000
    assert (await gateway.ending(request_id))["http_status"] == response.status


async def test_failures_of_every_kind_at_once_leave_no_task_slot_or_relay(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(worker=HASTY, slots=4)
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        assert response.status == 200
    await gateway.quiet()
    before = _tasks()
    scripts = [case[0] for case in (*BEFORE.values(), *BEFORE_WHOLE.values())] + [case[0] for case in AMID.values()]

    async def ask(script: dict[str, Any], *, stream: bool) -> None:
        async with session.post(gateway.chat_url, json=body(stream=stream, mock=script), headers=bearer()) as response:
            await response.read()

    await asyncio.gather(*(ask(script, stream=stream) for script in scripts for stream in (True, False)))
    await gateway.quiet()
    await eventually(lambda: _tasks() <= before, what="no more tasks than before")
    ends = [e for e in gateway.events if e["kind"] in ("request.finished", "request.rejected")]
    assert len(ends) == len({e["request_id"] for e in ends}) == 2 * len(scripts) + 1


def _tasks() -> int:
    return len(asyncio.all_tasks())
