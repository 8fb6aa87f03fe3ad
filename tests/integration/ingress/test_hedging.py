"""A second attempt beside one that says nothing: the first to speak is heard, the other is stopped and costs the client nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest

from bus.server import EmbeddedServer
from schemas.money import Usage, cost
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import PRICE, Event, Lines, bearer, body, timeouts
from tests.integration.ingress.routes import Routes, routes_up
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(40)

AFTER_S = 0.2
# A worker doesn't try that again by itself.
ABSENT: dict[str, Any] = {"status": 404, "error": {"message": "no model", "code": "model_not_found"}}

OpenRoutes = Callable[..., Awaitable[Routes]]


@pytest.fixture
async def open_routes(nats_server: EmbeddedServer) -> AsyncIterator[OpenRoutes]:
    async with contextlib.AsyncExitStack() as stack:

        async def open_(*names: str, **changes: Any) -> Routes:
            ingress = IngressSettings(**{"hedge": True, "hedge_after_s": AFTER_S, **changes})
            return await stack.enter_async_context(routes_up(nats_server.url, *names, ingress=ingress))

        yield open_


async def _text(session: aiohttp.ClientSession, up: Routes, content: str = "one two three") -> tuple[str, Lines]:
    async with Lines(session, up.chat_url, body(content, stream=True)) as answer:
        chunks = await answer.chunks()
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks), answer


def _usage(event: Event) -> Usage:
    return msgspec.convert(event["usage"], Usage)


async def test_the_second_speaks_first(open_routes: OpenRoutes, session: aiohttp.ClientSession) -> None:
    up = await open_routes("slow", "fast")
    up.mock("slow").script(stall_at=0)  # it says its role, and no word
    began = time.monotonic()
    text, answer = await _text(session, up)
    assert text == "one two three"
    assert time.monotonic() - began >= AFTER_S
    assert answer.headers["x-penstock-route"] == "fast"
    assert (answer.headers["x-penstock-attempts"], answer.headers["x-penstock-tried"]) == ("2", "slow;code=hedge_lost")
    event = await up.ending(answer.request_id)
    assert (event["route"], event["epoch"], event["attempts"]) == ("fast", 2, 2)
    assert (_usage(event).completion_tokens, event["cost_pico"]) == (3, cost(_usage(event), PRICE))
    (lost,) = up.of(answer.request_id, "attempt.lost")
    assert (lost["epoch"], lost["route"], lost["code"]) == (1, "slow", "hedge_lost")
    assert _usage(lost).prompt_tokens > 0
    assert lost["cost_pico"] == cost(_usage(lost), PRICE)
    await eventually(lambda: up.mock("slow").seen[0].gone_s is not None, what="the provider's connection closed")
    receipts = await up.receipts(answer.request_id, 2)
    assert (receipts["slow"]["outcome"], receipts["slow"]["code"]) == ("cancelled", "hedge_lost")


async def test_the_first_speaks_first_after_all(open_routes: OpenRoutes, session: aiohttp.ClientSession) -> None:
    up = await open_routes("first", "second")
    up.mock("first").script(delay_s=AFTER_S * 2, tokens=20, pace_s=0.01)
    up.mock("second").script(delay_s=30)
    text, answer = await _text(session, up)
    assert text == " ".join(f"w{n}" for n in range(20))
    event = await up.ending(answer.request_id)
    assert (event["route"], event["epoch"], event["attempts"]) == ("first", 1, 2)
    assert _usage(event).completion_tokens == 20
    (lost,) = up.of(answer.request_id, "attempt.lost")
    assert (lost["epoch"], lost["route"], lost["code"]) == (2, "second", "hedge_lost")
    await eventually(lambda: up.mock("second").seen[0].gone_s is not None, what="the provider's connection closed")


async def test_both_speak_at_once_and_only_one_is_heard(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    """Whoever wins: not a word of the other is in the answer, and only one is paid."""
    up = await open_routes("first", "second")
    late_s = 0.1  # that the second may be asked late on a busy machine
    for number in range(10):
        up.mock("first").script(text="a a a a", delay_s=AFTER_S + late_s + number * 0.003, pace_s=0.005)
        up.mock("second").script(text="b b b b", delay_s=late_s, pace_s=0.005)
        text, answer = await _text(session, up)
        assert text in ("a a a a", "b b b b")
        event = await up.ending(answer.request_id)
        assert event["route"] == {"a": "first", "b": "second"}[text[0]]
        assert (_usage(event).completion_tokens, event["attempts"]) == (4, 2)
        assert len(up.of(answer.request_id, "attempt.lost")) == 1


async def test_a_fast_answer_has_no_second_attempt(open_routes: OpenRoutes, session: aiohttp.ClientSession) -> None:
    up = await open_routes("first", "second", hedge_after_s=1.0)
    up.mock("first").script(tokens=40, pace_s=0.03)  # slow as a whole, but soon to speak
    _, answer = await _text(session, up)
    assert answer.headers["x-penstock-attempts"] == "1"
    assert not up.mock("second").seen


async def test_a_route_fails_while_another_runs_beside_it(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    up = await open_routes("first", "second", "third")
    up.mock("first").script(**ABSENT, delay_s=AFTER_S * 2)
    up.mock("second").script(delay_s=AFTER_S * 3)
    text, answer = await _text(session, up)
    assert text == "one two three"
    assert answer.headers["x-penstock-tried"] == "first;code=upstream_rejected;status=404"
    assert answer.headers["x-penstock-route"] == "second"
    assert not up.mock("third").seen


async def test_both_fail_and_the_third_is_asked(open_routes: OpenRoutes, session: aiohttp.ClientSession) -> None:
    up = await open_routes("first", "second", "third")
    up.mock("first").script(**ABSENT, delay_s=AFTER_S * 2)
    up.mock("second").script(**ABSENT, delay_s=AFTER_S * 2)
    text, answer = await _text(session, up)
    assert text == "one two three"
    assert (answer.headers["x-penstock-route"], answer.headers["x-penstock-attempts"]) == ("third", "3")


async def test_a_client_that_leaves_stops_both_and_pays_for_one(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    up = await open_routes("first", "second", keep_alive_comment_s=0.05)
    for name in ("first", "second"):
        up.mock(name).script(delay_s=30)
    async with Lines(session, up.chat_url, body(stream=True)) as answer:
        await answer.next()
        await eventually(lambda: up.mock("second").answering == 1)
        watch = Stopwatch()
    for name in ("first", "second"):
        await eventually(lambda name=name: up.mock(name).seen[0].gone_s is not None)  # type: ignore[misc]
    assert watch.s < 1.0
    event = await up.ending(answer.request_id)
    assert (event["status"], event["route"], event["attempts"]) == ("cancelled", "first", 2)
    assert (_usage(event).completion_tokens, event["cost_pico"]) == (0, cost(_usage(event), PRICE))
    (lost,) = up.of(answer.request_id, "attempt.lost")
    assert (lost["route"], lost["code"]) == ("second", "hedge_lost")


async def test_a_second_attempt_that_nobody_has_begun_is_withdrawn(
    nats_server: EmbeddedServer, session: aiohttp.ClientSession
) -> None:
    ingress = IngressSettings(hedge=True, hedge_after_s=AFTER_S, timeouts=timeouts())
    async with routes_up(nats_server.url, "first", "second", ingress=ingress, slots=1) as up:
        up.mock("second").script(tokens=500, pace_s=0.01)
        given = body("busy", stream=True, provider={"only": ["second"]})
        async with Lines(session, up.chat_url, given) as busy:
            await busy.next()  # its only slot is taken
            up.mock("first").script(delay_s=AFTER_S * 3)
            text, answer = await _text(session, up)
            assert text == "one two three"
            assert answer.headers["x-penstock-tried"] == "second;code=hedge_lost"
            await up.jobs_waiting(0)
        assert [seen.body["messages"][0]["content"] for seen in up.mock("second").seen] == ["busy"]


async def test_without_a_stream_there_is_no_second_attempt(
    open_routes: OpenRoutes, session: aiohttp.ClientSession
) -> None:
    """The ingress sees a whole answer at its end only: that it is slow doesn't say that it is late."""
    up = await open_routes("first", "second")
    up.mock("first").script(delay_s=AFTER_S * 2)
    async with session.post(up.chat_url, json=body(), headers=bearer()) as response:
        assert (response.status, response.headers["x-penstock-attempts"]) == (200, "1")
    assert not up.mock("second").seen
