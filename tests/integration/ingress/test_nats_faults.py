"""NATS goes away and comes back: what runs goes on, what waits waits again, what comes meanwhile is told so at once."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
import pytest

from bus.server import EmbeddedServer
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import Gateway, Lines, OpenGateway, bearer, body, headers_of, soon, timeouts
from tests.measured import measured
from tests.mock_provider import MockProvider
from tests.restarts import cut, frozen, kill, restart
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

BACK_WITHIN_S = 3.0

pytestmark = pytest.mark.timeout(40)


async def _ask(session: aiohttp.ClientSession, gateway: Gateway, content: str = "one two three") -> tuple[int, str]:
    async with session.post(gateway.chat_url, json=body(content), headers=bearer()) as response:
        told = await response.json()
        return response.status, told.get("error", {}).get("code") or told["choices"][0]["message"]["content"]


async def test_after_a_restart_while_idle_the_next_request_works_by_itself(
    gateway: Gateway,
    nats_server: EmbeddedServer,
    session: aiohttp.ClientSession,
) -> None:
    assert (await _ask(session, gateway))[0] == 200
    await nats_server.stop()
    await nats_server.start()
    watch = Stopwatch()

    async def works() -> bool:
        return (await _ask(session, gateway))[0] == 200

    await soon(works, what="a request", timeout_s=10)
    measured("nats_restarted_to_first_answer_ms", round(watch.wall_s * 1000))
    assert watch.s < BACK_WITHIN_S
    assert (await _ask(session, gateway))[0] == 200


@pytest.mark.parametrize("away_s", [0.0, 0.5])
async def test_streams_that_run_while_nats_is_killed_end_whole(
    gateway: Gateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession, away_s: float
) -> None:
    """The worker keeps what it has said for as long as the connection is away, and the ingress asks for what it missed."""
    mock.script(tokens=60, pace_s=0.02)

    async def read(number: int) -> str:
        async with Lines(session, gateway.chat_url, body(f"{number}", stream=True)) as stream:
            chunks = await stream.chunks()
            return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)

    reading = [asyncio.create_task(read(number)) for number in range(6)]
    await eventually(lambda: len(mock.seen) == 6 and all(seen.tokens_sent > 5 for seen in mock.seen))
    await kill(nats_server)
    await asyncio.sleep(away_s)
    await nats_server.start()
    whole = " ".join(f"w{number}" for number in range(60))
    assert await asyncio.gather(*reading) == [whole] * 6
    await eventually(lambda: len([e for e in gateway.events if e["kind"] == "request.finished"]) == 6)


async def test_jobs_that_waited_when_nats_was_killed_are_served(
    open_gateway: OpenGateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """The queue lives in memory: whoever waits for an answer puts the job in again."""
    gateway = await open_gateway(slots=1)
    mock.script(tokens=30, pace_s=0.1)
    async with Lines(session, gateway.chat_url, body("first", stream=True)) as first:
        await first.next()
        mock.script()
        waiting = [asyncio.create_task(_ask(session, gateway, f"waiting {number}")) for number in range(3)]
        await gateway.jobs_waiting(3)
        await restart(nats_server)
        assert (await first.rest())[-1] == b"data: [DONE]"
    assert await asyncio.gather(*waiting) == [(200, f"waiting {number}") for number in range(3)]
    assert sorted(seen.body["messages"][0]["content"] for seen in mock.seen) == [
        "first",
        *(f"waiting {number}" for number in range(3)),
    ]


async def test_jobs_that_waited_when_only_our_connection_broke_are_served_once(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """The queue still has them: what is put in again is the same job, and known to it."""
    gateway = await open_gateway(slots=1)
    mock.script(tokens=30, pace_s=0.1)
    async with Lines(session, gateway.chat_url, body("first", stream=True)) as first:
        await first.next()
        mock.script()
        waiting = [asyncio.create_task(_ask(session, gateway, f"waiting {number}")) for number in range(3)]
        await gateway.jobs_waiting(3)
        await cut(gateway.ingress.connection)
        await gateway.jobs_waiting(3)
        assert (await first.rest())[-1] == b"data: [DONE]"
    assert await asyncio.gather(*waiting) == [(200, f"waiting {number}") for number in range(3)]
    assert len(mock.seen) == 4
    await eventually(lambda: len([e for e in gateway.events if e["kind"] == "request.finished"]) == 4)
    assert {e["attempts"] for e in gateway.events if e["kind"] == "request.finished"} == {1}


async def test_a_request_whose_answer_comes_while_nats_is_away_gets_it_when_nats_is_back(
    gateway: Gateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(delay_s=1.0)
    asking = asyncio.create_task(_ask(session, gateway))
    await eventually(lambda: mock.answering == 1)
    await kill(nats_server)
    await eventually(lambda: mock.seen[-1].finished_s is not None)
    await asyncio.sleep(0.3)
    assert not asking.done()
    await nats_server.start()
    assert await asking == (200, "one two three")


async def test_while_nats_is_away_requests_are_refused_at_once_and_readiness_says_so(
    gateway: Gateway, nats_server: EmbeddedServer, session: aiohttp.ClientSession
) -> None:
    root = gateway.base_url.removesuffix("/v1")
    await nats_server.stop()
    await eventually(lambda: not gateway.ingress.connection.is_up)
    watch = Stopwatch()
    async with session.post(gateway.chat_url, json=body(), headers=bearer()) as response:
        told = await response.json()
        headers = headers_of(response)
        assert response.status == 503
    assert watch.s < 2.0
    assert told["error"]["code"] == "queue_unavailable"
    assert int(headers["retry-after"]) >= 1
    async with session.get(f"{root}/readyz") as response:
        assert response.status == 503
        assert msgspec.json.decode(await response.read())["nats"] is False
    async with session.get(f"{root}/healthz") as response:
        assert response.status == 200
    await nats_server.start()

    async def ready() -> bool:
        async with session.get(f"{root}/readyz") as response:
            return response.status == 200

    await soon(ready, timeout_s=10)
    event = await gateway.ending(headers["x-request-id"])
    assert (event["kind"], event["code"], event["http_status"]) == ("request.rejected", "queue_unavailable", 503)


async def test_a_client_that_leaves_while_nats_is_away_leaves_nothing_behind(
    gateway: Gateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    mock.script(tokens=1000, pace_s=0.01)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.next()
        await kill(nats_server)
    await eventually(lambda: len(gateway.ingress.switchboard) == 0)
    await nats_server.start()
    await eventually(lambda: mock.seen[-1].gone_s is not None, timeout_s=10, what="the provider's connection closed")
    assert (await gateway.ending(stream.request_id))["status"] == "cancelled"


async def test_workers_are_not_lost_because_we_did_not_hear_them_for_a_while(
    open_gateway: OpenGateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    """The worker's own connection may come back a little after ours."""
    gateway = await open_gateway(lost_after_s=3.0)
    mock.script(tokens=180, pace_s=0.03)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.next()
        await kill(nats_server)
        await asyncio.sleep(3.2)
        await nats_server.start()
        assert (await stream.rest())[-1] == b"data: [DONE]"


async def test_a_frozen_nats_delays_and_loses_nothing(
    open_gateway: OpenGateway, nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(ingress=IngressSettings(timeouts=timeouts()))
    mock.script(tokens=40, pace_s=0.01)
    async with Lines(session, gateway.chat_url, body(stream=True)) as stream:
        await stream.next()
        with frozen(nats_server.pid):
            await eventually(lambda: mock.seen[-1].finished_s is not None)
        chunks = await stream.chunks()
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert text.endswith("w39")
