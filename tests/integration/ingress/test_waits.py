"""The four time-outs, as a key, a route and a request state them."""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec
import pytest

from bus.server import EmbeddedServer
from schemas.jobs import TimeLimits
from schemas.settings import IngressSettings
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    MODEL,
    Gateway,
    OpenGateway,
    bearer,
    body,
    ingress_up,
    route_settings,
    sdk,
    timeouts,
    worker_up,
)
from tests.mock_provider import MockProvider
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(40)

STATED_S = 1.0  # long enough for a busy machine to begin a stream in
SLACK_S = 1.5

Case = tuple[str, str, dict[str, Any], bool]
CASES: dict[str, Case] = {
    "first token, stream": ("first-token", "first_token_timeout", {"stall_at": -1}, True),
    "first token, whole": ("first-token", "first_token_timeout", {"stall_at": 1}, False),
    "idle": ("idle", "idle_timeout", {"stall_at": 2}, True),
    "total, stream": ("total", "total_timeout", {"pace_s": 0.05, "tokens": 1000}, True),
    "total, whole": ("total", "total_timeout", {"pace_s": 0.05, "tokens": 1000}, False),
}


async def _told(response: aiohttp.ClientResponse) -> tuple[int, str]:
    raw = (await response.read()).strip().rpartition(b"data: ")[2]
    return response.status, msgspec.json.decode(raw)["error"]["code"]


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
async def test_a_request_states_its_own(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, case: Case
) -> None:
    name, code, script, stream = case
    mock.script(**script)
    watch = Stopwatch()
    headers = {**bearer(), f"x-penstock-timeout-{name}": str(STATED_S)}
    async with session.post(gateway.chat_url, json=body(stream=stream), headers=headers) as response:
        status, told = await _told(response)
    assert watch.wall_s >= STATED_S
    assert watch.s < STATED_S + SLACK_S
    assert told == code
    assert status == (200 if stream and name in ("idle", "total") else 504)
    await eventually(lambda: mock.seen[-1].gone_s is not None, what="the provider's connection closed")


async def test_a_request_states_how_long_it_queues(
    open_gateway: OpenGateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    gateway = await open_gateway(slots=1)
    mock.script(tokens=400, pace_s=0.01)
    async with session.post(gateway.chat_url, json=body(stream=True), headers=bearer()) as busy:
        await busy.content.readline()
        watch = Stopwatch()
        headers = {**bearer(), "x-penstock-timeout-queue": "0.4"}
        async with session.post(gateway.chat_url, json=body(), headers=headers) as response:
            assert await _told(response) == (504, "queue_timeout")
        assert watch.wall_s >= 0.4
        assert watch.s < 0.4 + SLACK_S
        await gateway.jobs_waiting(0)


async def test_the_sdk_can_state_them(gateway: Gateway, mock: MockProvider) -> None:
    mock.script(stall_at=-1)
    async with sdk(gateway.base_url) as client:
        with pytest.raises(Exception, match="did not answer in time"):
            await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hi"}],
                extra_headers={"x-penstock-timeout-first-token": "0.2"},
            )


@pytest.mark.parametrize("header", [("x-penstock-timeout-total", "soon"), ("x-penstock-timeout-sum", "1")])
async def test_a_bad_one_is_a_clear_400_before_anything_is_queued(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession, header: tuple[str, str]
) -> None:
    name, value = header
    async with session.post(gateway.chat_url, json=body(), headers={**bearer(), name: value}) as response:
        told = msgspec.json.decode(await response.read())["error"]
    assert (response.status, told["code"], told["param"]) == (400, "invalid_request", name)
    assert not mock.seen
    assert (await gateway.ending())["kind"] == "request.rejected"


async def test_a_key_states_them_for_its_requests_which_may_not_ask_for_more(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    keys = gateway.base_url.removesuffix("/v1") + "/admin/v1/keys"
    wanted = {"name": "hasty", "timeouts": {"first_token_s": 0.4}}
    async with session.post(keys, json=wanted, headers=bearer(ADMIN_KEY)) as response:
        made = await response.json()
        assert (response.status, made["timeouts"]) == (201, {"first_token_s": 0.4})
    for asked, expected_s in (
        ({}, 0.4),
        ({"x-penstock-timeout-first-token": "9"}, 0.4),
        ({"x-penstock-timeout-first-token": "0.2"}, 0.2),
    ):
        mock.script(stall_at=-1)
        watch = Stopwatch()
        async with session.post(gateway.chat_url, json=body(), headers={**bearer(made["key"]), **asked}) as response:
            assert await _told(response) == (504, "first_token_timeout")
        assert watch.wall_s >= expected_s
        assert watch.s < expected_s + SLACK_S
    async with session.post(keys, json={"timeouts": {"idle_s": 0}}, headers=bearer(ADMIN_KEY)) as response:
        assert response.status == 400
    async with session.get(keys, headers=bearer(ADMIN_KEY)) as response:
        assert {"first_token_s": 0.4} in [key["timeouts"] for key in (await response.json())["data"]]


async def test_a_route_states_them(
    nats_server: EmbeddedServer, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    route = msgspec.structs.replace(route_settings(mock), timeouts=TimeLimits(first_token_s=STATED_S, total_s=1.4))
    settings = IngressSettings(timeouts=timeouts())
    async with (
        ingress_up(nats_server.url, settings=settings, routes=(route,)) as up,
        worker_up(nats_server.url, route),
    ):
        await eventually(lambda: up.fleet.offers(MODEL))
        mock.script(stall_at=-1)
        watch = Stopwatch()
        async with session.post(f"{up.base_url}/chat/completions", json=body(), headers=bearer()) as response:
            assert await _told(response) == (504, "first_token_timeout")
        assert watch.wall_s >= STATED_S
        assert watch.s < STATED_S + SLACK_S
        mock.script(pace_s=0.05, tokens=1000)
        watch = Stopwatch()
        async with session.post(
            f"{up.base_url}/chat/completions", json=body(stream=True), headers=bearer()
        ) as response:
            assert await _told(response) == (200, "total_timeout")
        assert watch.wall_s >= 1.4
        assert watch.s < 1.4 + SLACK_S
        await eventually(lambda: mock.seen[-1].gone_s is not None, what="the provider's connection closed")


async def test_a_whole_answer_is_no_failure_because_its_usage_does_not_come_in_time(
    gateway: Gateway, mock: MockProvider, session: aiohttp.ClientSession
) -> None:
    said = ({"delta": {"content": "all"}, "finish_reason": None}, {"delta": {}, "finish_reason": "stop"})
    chunks = (msgspec.json.encode({"choices": [{"index": 0, **choice}]}).decode() for choice in said)
    mock.script(raw="".join(f"data: {chunk}\n\n" for chunk in chunks), linger=True)
    headers = {**bearer(), "x-penstock-timeout-total": str(STATED_S)}
    async with session.post(gateway.chat_url, json=body(stream=True), headers=headers) as response:
        assert (await response.read()).strip().endswith(b"data: [DONE]")
    ending = await gateway.ending()
    assert (ending["status"], ending["finish_reason"], ending["estimated"]) == ("completed", "stop", True)
