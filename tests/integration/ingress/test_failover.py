"""An attempt that comes to nothing before the first token is made again on the next route, and the client sees none of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from bus.server import EmbeddedServer
from schemas.money import Usage, cost
from schemas.settings import IngressSettings, WorkerSettings
from tests.integration.ingress.gateway import (
    CLIENT_KEY,
    MODEL,
    PRICE,
    Lines,
    bearer,
    body,
    headers_of,
    sdk,
    timeouts,
    worker_up,
)
from tests.integration.ingress.routes import Routes, routes_up
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(40)

HASTY = WorkerSettings(drain_s=0.2, first_byte_timeout_s=1.5, idle_timeout_s=1.5, tries=1)
ONCE = WorkerSettings(drain_s=0.2, tries=1)  # where no time-out is waited for: a busy machine needs longer
REJECTED = {
    "message": "too long",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}
MESSAGES: Any = [{"role": "user", "content": "one two three"}]

OpenRoutes = Callable[..., Awaitable[Routes]]

# What the first route does; the code under which it is told.
EITHER: dict[str, tuple[dict[str, Any], str]] = {
    "429": ({"status": 429}, "upstream_rate_limited;status=429"),
    "500": ({"status": 500}, "upstream_error;status=500"),
    "503": ({"status": 503, "body": "<html>"}, "upstream_error;status=503"),
    "401": ({"status": 401}, "upstream_auth;status=401"),
    "404": (
        {"status": 404, "error": {"message": "no model", "code": "model_not_found"}},
        "upstream_rejected;status=404",
    ),
    "too long for it": ({"status": 400, "error": REJECTED}, "upstream_rejected;status=400"),
    "reset": ({"reset": True}, "upstream_unreachable"),
    "silence": ({"stall_at": -1}, "upstream_timeout"),
    "html": ({"body": "<html>", "content_type": "text/html"}, "upstream_invalid_response"),
}
WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "an error in a 200": ({"body": '{"error": {"message": "x"}}'}, "upstream_error"),
    "silence in the body": ({"stall_at": 2}, "upstream_timeout"),
    "a short body": ({"short_by": 20}, "upstream_error"),
}
STREAM: dict[str, tuple[dict[str, Any], str]] = {
    "cut after the role": ({"cut_at": 0, "pace_s": 0.02}, "upstream_error"),
    "silence after the role": ({"stall_at": 0}, "upstream_timeout"),
    "an error after the role": ({"error_at": 0, "pace_s": 0.02}, "upstream_error"),
    "an error first": ({"raw": 'data: {"error": {"message": "busy", "code": 503}}\n\n'}, "upstream_error;status=503"),
    "nothing": ({"raw": ""}, "upstream_error"),
    "only done": ({"raw": "data: [DONE]\n\n"}, "upstream_invalid_response"),
}


@pytest.fixture
async def open_routes(nats_server: EmbeddedServer) -> AsyncIterator[OpenRoutes]:
    import contextlib

    async with contextlib.AsyncExitStack() as stack:

        async def open_(*names: str, **settings: Any) -> Routes:
            return await stack.enter_async_context(routes_up(nats_server.url, *names, **settings))

        yield open_


def _cases(stream: bool) -> list[Any]:
    tables = {**EITHER, **(STREAM if stream else WHOLE)}
    return [
        pytest.param(stream, *case, id=f"{'stream' if stream else 'whole'}-{name}") for name, case in tables.items()
    ]


@pytest.mark.parametrize(("stream", "script", "told"), [*_cases(False), *_cases(True)])
async def test_a_fault_before_the_first_token_goes_to_the_next_route_unseen(
    open_routes: OpenRoutes, stream: bool, script: dict[str, Any], told: str
) -> None:
    up = await open_routes("first", "second", worker=HASTY if "stall_at" in script else ONCE)
    up.mock("first").script(**script)
    async with sdk(up.base_url) as client:
        if stream:
            raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in raw.parse() if chunk.choices]
            text = "".join(pieces)
        else:
            raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
            text = raw.parse().choices[0].message.content or ""
    assert text == "one two three"
    headers = {name.lower(): value for name, value in raw.headers.items()}
    code = told.partition(";")[0]
    assert (headers["x-penstock-route"], headers["x-penstock-attempts"]) == ("second", "2")
    assert headers["x-penstock-tried"].startswith(f"first;code={code}")
    if "status" in told:
        assert headers["x-penstock-tried"] == f"first;code={told}"
    event = await up.ending(headers["x-request-id"])
    assert (event["status"], event["route"], event["attempts"]) == ("completed", "second", 2)
    usage = msgspec.convert(event["usage"], Usage)
    assert (usage.completion_tokens, event["cost_pico"]) == (3, cost(usage, PRICE))
    (lost,) = up.of(headers["x-request-id"], "attempt.lost")
    assert (lost["epoch"], lost["route"], lost["code"]) == (1, "first", code)
    receipts = await up.receipts(headers["x-request-id"], 2)
    assert (receipts["first"]["outcome"], receipts["first"]["code"]) == ("failed", code)
    assert receipts["second"]["outcome"] == "completed"
    assert [len(up.mock(name).seen) for name in ("first", "second")] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_after_a_comment_the_next_route_is_still_tried(
    open_routes: OpenRoutes, session: aiohttp.ClientSession, stream: bool
) -> None:
    """The status has been sent by then, but no content."""
    up = await open_routes("first", "second", ingress=IngressSettings(keep_alive_comment_s=0.05))
    up.mock("first").script(status=500, delay_s=0.3)
    async with Lines(session, up.chat_url, body(stream=stream)) as answer:
        if stream:
            comment = await answer.next()
            assert comment == b": keep-alive"
            chunks = await answer.chunks()
            assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "one two three"
        else:
            await answer.rest()
    event = await up.ending(answer.request_id)
    assert (event["status"], event["http_status"], event["route"]) == ("completed", 200, "second")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_rejected_request_is_not_carried_around(open_routes: OpenRoutes, stream: bool) -> None:
    up = await open_routes("first", "second")
    up.mock("first").script(status=400, error={"message": "temperature is too high", "code": "invalid_value"})
    async with sdk(up.base_url) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    assert caught.value.code == "invalid_value"
    assert caught.value.response.headers["x-penstock-tried"] == "first;code=upstream_rejected;status=400"
    assert len(up.mock("second").seen) == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_when_all_routes_fail_the_last_error_is_told_and_all_are_named(
    open_routes: OpenRoutes, stream: bool
) -> None:
    up = await open_routes("first", "second", "third")
    up.mock("first").script(status=500)
    up.mock("second").script(status=401)
    up.mock("third").script(status=429, headers={"retry-after": "7"})
    async with sdk(up.base_url) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    headers = caught.value.response.headers
    assert headers["retry-after"] == "7"
    assert headers["x-penstock-tried"] == (
        "first;code=upstream_error;status=500, second;code=upstream_auth;status=401, "
        "third;code=upstream_rate_limited;status=429"
    )
    event = await up.ending(caught.value.request_id)
    assert (event["status"], event["attempts"], event["cost_pico"]) == ("failed", 3, 0)
    assert [e["route"] for e in up.of(caught.value.request_id, "attempt.lost")] == ["first", "second"]


@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_takes_the_job_in_time(
    open_routes: OpenRoutes, session: aiohttp.ClientSession, stream: bool
) -> None:
    """All slots of the first route are taken: its queue time-out ends, the job is withdrawn there and served elsewhere."""
    up = await open_routes("first", "second", slots=1, ingress=IngressSettings(timeouts=timeouts(queue_s=1.0)))
    up.mock("first").script(tokens=500, pace_s=0.01)
    async with Lines(session, up.chat_url, body("busy", stream=True)) as busy:
        await busy.next()
        watch = Stopwatch()
        async with Lines(session, up.chat_url, body(stream=stream)) as answer:
            await answer.rest()
        took_s, without_s = watch.wall_s, watch.s
        await up.jobs_waiting(0)
    assert answer.headers["x-penstock-route"] == "second"
    assert answer.headers["x-penstock-tried"] == "first;code=queue_timeout"
    assert took_s >= 1.0
    assert without_s < 3.0
    assert [seen.body["messages"][0]["content"] for seen in up.mock("first").seen] == ["busy"]


async def test_a_worker_that_says_nothing_in_time_is_stopped_and_the_next_route_asked(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    up = await open_routes("first", "second", ingress=IngressSettings(timeouts=timeouts(first_token_s=1.5)))
    up.mock("first").script(stall_at=0)  # after its role
    watch = Stopwatch()
    async with Lines(session, up.chat_url, body(stream=True)) as answer:
        await answer.chunks()
    assert watch.wall_s >= 1.5
    assert watch.s < 3.0
    assert answer.headers["x-penstock-tried"] == "first;code=first_token_timeout"
    await eventually(lambda: up.mock("first").seen[0].gone_s is not None, what="the provider's connection closed")
    receipts = await up.receipts(answer.request_id, 2)
    assert (receipts["first"]["outcome"], receipts["first"]["code"]) == ("cancelled", "first_token_timeout")


async def test_a_route_that_dies_while_the_job_waits_there_is_left_at_once(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    up = await open_routes("first", "second", slots=1)
    up.mock("first").script(tokens=500, pace_s=0.01)
    async with Lines(session, up.chat_url, body("busy", stream=True)) as busy:
        await busy.next()
        asking = asyncio.create_task(_whole(session, up.chat_url))
        await up.jobs_waiting(1)
        watch = Stopwatch()
        up.places["first"].worker._tell(up.places["first"].route, "engine_starting")
        status, headers = await asking
        assert (status, headers["x-penstock-route"]) == (200, "second")
        assert watch.s < 2.0
        assert headers["x-penstock-tried"] == "first;code=no_live_route"
        await up.jobs_waiting(0)


async def _whole(session: aiohttp.ClientSession, url: str, **more: Any) -> tuple[int, dict[str, str]]:
    async with session.post(url, json=body(**more), headers=bearer(CLIENT_KEY)) as response:
        await response.read()
        return response.status, headers_of(response)


async def test_a_worker_that_drains_before_its_first_token_hands_over_unseen(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    up = await open_routes("first", "second", worker=WorkerSettings(drain_s=0.1))
    up.mock("first").script(delay_s=20)
    asking = asyncio.create_task(_whole(session, up.chat_url))
    await eventually(lambda: up.mock("first").answering == 1)
    draining = asyncio.create_task(up.places["first"].worker.drain())
    status, headers = await asking
    await draining
    assert (status, headers["x-penstock-route"]) == (200, "second")
    assert headers["x-penstock-tried"] == "first;code=worker_yielded"


async def test_another_worker_of_the_same_route_has_it_after_the_first_one_failed(
    open_routes: OpenRoutes, nats_server: EmbeddedServer, session: aiohttp.ClientSession
) -> None:
    """Whoever failed is not asked again, though it has free slots: the job says so, and it leaves it to the other."""
    up = await open_routes("only", worker=ONCE)
    place = up.places["only"]
    async with worker_up(nats_server.url, place.settings, settings=ONCE) as (other, _):
        await eventually(lambda: len(up.ingress.fleet.servers("only", MODEL)) == 2)  # type: ignore[arg-type]
        for number in range(8):
            place.mock.forget()
            place.mock.script(status=500, delay_s=0.1)
            asking = asyncio.create_task(_whole(session, up.chat_url))
            await eventually(lambda: len(place.mock.seen) == 1)
            place.mock.script()
            status, headers = await asking
            assert (status, headers["x-penstock-attempts"]) == (200, "2"), number
            await eventually(lambda: len(up.of(headers["x-request-id"], "attempt.finished")) == 2)  # noqa: B023
            first, second = sorted(up.of(headers["x-request-id"], "attempt.finished"), key=lambda e: e["epoch"])
            assert first["worker"] != second["worker"]
            assert {first["worker"], second["worker"]} == {place.worker.id, other.id}


async def test_a_fault_after_the_first_token_is_not_hidden(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    up = await open_routes("first", "second")
    up.mock("first").script(error_at=2, pace_s=0.01)
    async with Lines(session, up.chat_url, body(stream=True)) as answer:
        *_, last = await answer.rest()
    assert b'"error"' in last
    assert len(up.mock("second").seen) == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_after_the_first_route_failed_stops_the_second(
    open_routes: OpenRoutes, session: aiohttp.ClientSession, stream: bool
) -> None:
    up = await open_routes("first", "second")
    up.mock("first").script(status=500)
    up.mock("second").script(delay_s=20)
    asking = asyncio.create_task(_whole(session, up.chat_url, stream=stream))
    await eventually(lambda: up.mock("second").answering == 1)
    await eventually(lambda: len(up.of(None, "attempt.started")) == 2, what="that the ingress knows of it, too")
    asking.cancel()
    watch = Stopwatch()
    await eventually(lambda: up.mock("second").seen[0].gone_s is not None, what="the provider's connection closed")
    assert watch.s < 1.0
    event = await up.ending()
    assert (event["status"], event["route"], event["attempts"]) == ("cancelled", "second", 2)
    usage = msgspec.convert(event["usage"], Usage)
    assert (usage.completion_tokens, event["cost_pico"]) == (0, cost(usage, PRICE))
    assert usage.prompt_tokens > 0


async def test_the_total_time_out_bounds_all_attempts_together(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    up = await open_routes(
        "first", "second", ingress=IngressSettings(timeouts=timeouts(first_token_s=1.0, total_s=1.6))
    )
    for name in ("first", "second"):
        up.mock(name).script(stall_at=-1)
    watch = Stopwatch()
    async with session.post(up.chat_url, json=body(), headers=bearer()) as response:
        told = await response.json()
    assert (response.status, told["error"]["code"]) == (504, "total_timeout")
    assert watch.wall_s >= 1.6
    assert watch.s < 3.0
    assert response.headers["x-penstock-tried"] == "first;code=first_token_timeout"
    for name in ("first", "second"):
        await eventually(lambda name=name: up.mock(name).seen[0].gone_s is not None)  # type: ignore[misc]


async def test_a_full_backlog_of_one_route_is_the_next_ones_work(
    open_routes: OpenRoutes, nats_server: EmbeddedServer, session: aiohttp.ClientSession
) -> None:
    up = await open_routes("first", "second", slots=1)
    up.mock("first").script(tokens=300, pace_s=0.01)
    answer = await up.ingress.connection.api("STREAM.INFO.JOBS")
    await up.ingress.connection.api("STREAM.UPDATE.JOBS", {**answer["config"], "max_msgs_per_subject": 1})
    async with Lines(session, up.chat_url, body("busy", stream=True)) as busy:
        await busy.next()
        waiting = asyncio.create_task(_whole(session, up.chat_url))
        await up.jobs_waiting(1)
        status, headers = await _whole(session, up.chat_url)
        assert (status, headers["x-penstock-route"]) == (200, "second")
        assert headers["x-penstock-tried"] == "first;code=backlog_full"
    assert (await waiting)[0] == 200
