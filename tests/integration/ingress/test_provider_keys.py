"""Several keys at one provider, from the client's side: what one key suffers, no client sees."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from bus.server import EmbeddedServer
from schemas.settings import IngressSettings, RouteSettings, WorkerSettings
from tests.integration.ingress.gateway import (
    ADMIN_KEY,
    MODEL,
    IngressUnderTest,
    bearer,
    body,
    ingress_up,
    route_settings,
    sdk,
    worker_up,
)
from tests.mock_provider import MockProvider, Quota
from tests.stopwatch import Stopwatch
from tests.waiting import eventually
from workers.providers.accounts import Rules
from workers.providers.keys import KeyRules

KEYS = {"ONE": "sk-first-0123456789", "TWO": "sk-second-0123456789", "THREE": "sk-third-0123456789"}
ONE, TWO, THREE = KEYS.values()
ON_THE_WAY_S = 0.2  # a request may take so much longer than another from the worker, which counts it, to the provider
LABELS = tuple(f"env:{name}" for name in KEYS)
MESSAGES: Any = body()["messages"]


@dataclass
class Desk:
    """A gateway whose route has three keys."""

    ingress: IngressUnderTest
    mock: MockProvider

    async def ask(self, *, stream: bool = False) -> str:
        """The answer's text, by the real SDK, which is told not to retry."""
        async with sdk(self.ingress.base_url) as client:
            if not stream:
                answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
                return answer.choices[0].message.content or ""
            pieces = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            return "".join([piece.choices[0].delta.content or "" async for piece in pieces if piece.choices])

    async def route(self) -> dict[str, Any]:
        """The only live route, as an admin is told."""
        url = f"{self.ingress.base_url.removesuffix('/v1')}/admin/v1/routes"
        async with aiohttp.ClientSession() as session, session.get(url, headers=bearer(ADMIN_KEY)) as response:
            (row,) = (await response.json())["data"]
        return dict(row)

    async def keys(self) -> dict[str, str]:
        return {key["label"]: key["state"] for key in (await self.route())["keys"]}

    def asked(self) -> Counter[str]:
        """How often each key was shown to the provider."""
        return Counter(seen.key for seen in self.mock.seen if seen.path.endswith("/completions"))


OpenDesk = Callable[..., Awaitable[Desk]]


@pytest.fixture
async def open_desk(
    nats_server: EmbeddedServer, mock: MockProvider, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[OpenDesk]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    async with AsyncExitStack() as stack:

        async def open_(*, worker: WorkerSettings | None = None, rules: Rules | None = None, **changes: Any) -> Desk:
            settings: RouteSettings = msgspec.structs.replace(route_settings(mock), **{"api_keys": LABELS, **changes})
            up = await stack.enter_async_context(
                ingress_up(nats_server.url, settings=IngressSettings(), routes=(settings,))
            )
            await stack.enter_async_context(worker_up(nats_server.url, settings, settings=worker, rules=rules))
            await eventually(lambda: up.fleet.offers(MODEL), what="the worker's presence")
            return Desk(up, mock)

        yield open_


async def all_answers(desk: Desk, requests: int, *, at_once: int = 8) -> list[str]:
    room = asyncio.Semaphore(at_once)

    async def one(number: int) -> str:
        async with room:
            return await desk.ask(stream=number % 2 == 0)

    return list(await asyncio.gather(*(one(number) for number in range(requests))))


async def test_one_limited_key_and_one_refused_key_never_show_a_client_an_error(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk()
    mock.script_key(ONE, status=429, headers={"retry-after": "120"})
    mock.script_key(TWO, status=401)
    answers = await all_answers(desk, 100)
    assert answers == ["one two three"] * 100
    asked = desk.asked()
    assert asked[THREE] == 100
    assert asked[ONE] + asked[TWO] <= 16, "both were asked by those that were under way, and then left alone"
    expected = dict(zip(LABELS, ("cooling", "dead", "ready"), strict=True))

    async def told() -> bool:
        return await desk.keys() == expected

    await eventually(told, what="the beat of presence that tells of the keys")


async def test_all_keys_take_turns(open_desk: OpenDesk) -> None:
    desk = await open_desk()
    await all_answers(desk, 30, at_once=3)
    assert min(desk.asked()[key] for key in (ONE, TWO, THREE)) >= 5


async def test_what_retry_after_says_is_kept_to(open_desk: OpenDesk, mock: MockProvider) -> None:
    desk = await open_desk(api_keys=LABELS[:1])
    mock.script_next({"status": 429, "headers": {"retry-after": "2"}})
    watch = Stopwatch()
    assert await desk.ask() == "one two three"
    first, second = (seen.at_s for seen in mock.seen)
    assert second - first >= 2.0
    assert second - first - watch.waited_s < 4.0


async def test_a_key_is_left_alone_for_as_long_as_it_asked_and_used_again_then(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk(api_keys=LABELS[:2])
    mock.script_key(ONE, status=429, headers={"retry-after-ms": "1500"})
    while not desk.asked()[ONE]:
        await desk.ask()
    (limited,) = (seen.at_s for seen in mock.seen if seen.key == ONE)
    mock.script_key(ONE)
    while desk.asked()[ONE] < 2:
        await desk.ask()
    assert mock.seen[-1].at_s - limited >= 1.5


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failing_provider_is_asked_again_with_the_same_key_after_pauses(
    open_desk: OpenDesk, mock: MockProvider, stream: bool
) -> None:
    desk = await open_desk(api_keys=LABELS[:1])
    mock.script_next({"status": 500}, {"reset": True})
    assert await desk.ask(stream=stream) == "one two three"
    first, second, third = (seen.at_s for seen in mock.seen)
    assert second - first >= 0.1
    assert third - second >= 0.2
    assert await desk.keys() == {LABELS[0]: "ready"}


async def test_a_provider_that_goes_on_failing_is_not_asked_for_ever(open_desk: OpenDesk, mock: MockProvider) -> None:
    desk = await open_desk()
    mock.script(status=503)
    with pytest.raises(openai.InternalServerError) as caught:
        await desk.ask()
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_error")
    assert len(mock.seen) == 3


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_request_that_is_no_good_is_asked_once(open_desk: OpenDesk, mock: MockProvider, status: int) -> None:
    desk = await open_desk()
    mock.script(status=status, error={"message": "no such parameter", "type": "invalid_request_error"})
    with pytest.raises(openai.APIStatusError) as caught:
        await desk.ask()
    assert caught.value.status_code == status
    assert len(mock.seen) == 1


async def test_what_has_begun_is_not_begun_again(open_desk: OpenDesk, mock: MockProvider) -> None:
    desk = await open_desk()
    mock.script(tokens=20, cut_at=5)
    with pytest.raises(openai.APIError):
        await desk.ask(stream=True)
    assert len(mock.seen) == 1


async def test_a_client_that_leaves_while_its_request_waits_to_be_tried_again_ends_it(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk(api_keys=LABELS[:1])
    mock.script(status=429, headers={"retry-after": "3"})
    asking = asyncio.create_task(desk.ask())
    await eventually(lambda: len(mock.seen) == 1, what="the first try")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    mock.script()
    await asyncio.sleep(3.5)
    assert len(mock.seen) == 1


async def test_all_keys_dead_takes_the_route_down_with_the_reason_and_a_probe_brings_it_back(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk()
    for key, status in ((ONE, 401), (TWO, 402), (THREE, 403)):
        mock.script_key(key, status=status)
    with pytest.raises(openai.InternalServerError) as caught:
        await desk.ask()
    assert caught.value.code in {"upstream_auth", "no_live_route"}
    await eventually(lambda: not desk.ingress.fleet.offers(MODEL), what="the route is down everywhere")
    with pytest.raises(openai.InternalServerError) as caught:
        await desk.ask()
    assert (caught.value.status_code, caught.value.code) == (503, "no_live_route")
    assert "refused (HTTP 401), refused (HTTP 402), refused (HTTP 403)" in caught.value.message
    row = await desk.route()
    assert row["state"].startswith("down: none of its keys is of use")
    assert set((await desk.keys()).values()) == {"dead"}
    mock.script_key(TWO)
    await eventually(lambda: desk.ingress.fleet.offers(MODEL), what="the route is back", timeout_s=15.0)
    assert (await desk.keys())[LABELS[1]] == "ready"
    assert await desk.ask() == "one two three"


async def test_a_key_that_is_changed_in_its_file_is_read_again_when_it_was_refused(
    open_desk: OpenDesk, mock: MockProvider, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(ONE)
    desk = await open_desk(api_keys=(f"file:{file}",))
    mock.script_key(ONE, status=401)
    with pytest.raises(openai.InternalServerError):
        await desk.ask()
    file.write_text(TWO)
    await eventually(lambda: TWO in desk.asked(), what="a probe with the new key", timeout_s=10.0)
    await eventually(lambda: desk.ingress.fleet.offers(MODEL), what="the route is back")
    assert await desk.ask() == "one two three"


async def test_a_provider_that_fails_is_taken_down_and_a_probe_brings_it_back(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk(worker=WorkerSettings(drain_s=0.2, tries=1))
    assert await desk.ask() == "one two three"
    mock.script(status=500)
    for _ in range(12):
        with pytest.raises(openai.APIStatusError) as caught:
            await desk.ask()
    assert (caught.value.status_code, caught.value.code) == (503, "no_live_route")
    assert (await desk.route())["state"] == "down: the provider fails: The provider failed (HTTP 500)."
    mock.script()
    watch = Stopwatch()
    await eventually(lambda: desk.ingress.fleet.offers(MODEL), what="the route is back", timeout_s=10.0)
    assert watch.s < 5.0
    assert await desk.ask() == "one two three"
    health = (await desk.route())["health"]
    assert health["error_rate"] == 0.0


async def test_a_routes_requests_a_minute_are_never_more_and_the_others_wait_in_the_queue(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk(requests_per_minute=5)
    asking = [asyncio.create_task(desk.ask()) for _ in range(12)]
    await eventually(lambda: sum(task.done() for task in asking) == 5, what="five answers")
    await asyncio.sleep(3.0)
    assert len(mock.seen) == 5
    row = await desk.route()
    assert row["state"] == "held: its 5 requests a minute are used up"
    assert row["rates"]["requests"] == 5
    assert row["free"] == row["slots"], "they wait in the queue, where another worker could take them"
    assert desk.ingress.fleet.offers(MODEL), "held is not down"
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_held_jobs_go_on_when_the_minute_is_over(open_desk: OpenDesk, mock: MockProvider) -> None:
    """A minute of two seconds: by the provider's own record there are never more than five requests in one."""
    desk = await open_desk(requests_per_minute=5, rules=Rules(keys=KeyRules(minute_s=2.0)))
    assert await all_answers(desk, 17, at_once=17) == ["one two three"] * 17
    times = sorted(seen.at_s for seen in mock.seen)
    window_s = 2.0 - ON_THE_WAY_S
    assert [sum(first <= at < first + window_s for at in times) for first in times] == pytest.approx([3] * 17, abs=2)
    assert (await desk.route())["state"] in {"serving", "held: its 5 requests a minute are used up"}


async def test_tokens_a_minute_are_kept_to(open_desk: OpenDesk, mock: MockProvider) -> None:
    """An answer of 50 tokens to a prompt of about 10: what was expected beforehand is put right by what was counted."""
    desk = await open_desk(tokens_per_minute=600, rules=Rules(keys=KeyRules(minute_s=3.0)))
    mock.script(tokens=50)
    await all_answers(desk, 24, at_once=4)
    times = sorted(seen.at_s for seen in mock.seen)
    most = max(sum(first <= at < first + 3.0 for at in times) for first in times)
    assert 4 <= most <= 12


async def test_a_limit_that_lasts_takes_the_route_down_and_says_until_when(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk(api_keys=LABELS[:1])
    mock.script(status=429, headers={"retry-after": "7200"})
    with pytest.raises(openai.RateLimitError) as caught:
        await desk.ask()
    assert 7100 < int(caught.value.response.headers["retry-after"]) <= 7200
    await eventually(lambda: not desk.ingress.fleet.offers(MODEL), what="the route is down")
    assert (await desk.route())["state"].startswith("down: the provider's rate limit is reached until 20")
    assert len(mock.seen) == 1


async def test_a_provider_that_begins_too_late_is_taken_down_where_that_is_stated(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    desk = await open_desk(first_token_max_s=0.3)
    mock.script(delay_s=0.8)
    await asyncio.gather(*(desk.ask(stream=True) for _ in range(6)))
    await eventually(lambda: not desk.ingress.fleet.offers(MODEL), what="the route is down")
    row = await desk.route()
    assert row["state"].startswith("down: it begins to answer after ")
    assert row["health"]["first_token_ms"] >= 800
    mock.script()
    await eventually(lambda: desk.ingress.fleet.offers(MODEL), what="the route is back", timeout_s=15.0)


async def test_what_a_provider_tells_of_its_limits_is_kept_to_before_it_says_429(
    open_desk: OpenDesk, mock: MockProvider
) -> None:
    """Two keys with three requests each in every two seconds: 18 requests take three windows, and none is refused."""
    desk = await open_desk(api_keys=LABELS[:2])
    mock.quotas = {ONE: Quota(3, 2.0), TWO: Quota(3, 2.0)}
    await all_answers(desk, 2, at_once=1)  # what is left is told with the first answer
    began = time.monotonic()
    assert await all_answers(desk, 18, at_once=6) == ["one two three"] * 18
    assert time.monotonic() - began >= 4.0
    assert [quota.refused for quota in mock.quotas.values()] == [0, 0]


async def test_how_often_a_provider_was_asked_is_in_the_receipt(open_desk: OpenDesk, mock: MockProvider) -> None:
    desk = await open_desk(api_keys=LABELS[:1])
    receipts: list[dict[str, Any]] = []

    async def on_page(msg: Any) -> None:
        lines = [msgspec.json.decode(line) for line in msg.data.split(b"\n")]
        receipts.extend(line for line in lines if line["kind"] == "attempt.finished")

    await desk.ingress.connection.listen("events.>", on_page)
    mock.script_next({"status": 500})
    await desk.ask()
    mock.script_next({"status": 500}, {"status": 400})
    with pytest.raises(openai.BadRequestError):
        await desk.ask()
    await desk.ask()
    await eventually(lambda: len(receipts) == 3, what="the receipts")
    assert [(receipt["outcome"], receipt["tries"]) for receipt in receipts] == [
        ("completed", 2),
        ("failed", 2),
        ("completed", 1),
    ]


async def test_no_key_is_ever_told(
    open_desk: OpenDesk, mock: MockProvider, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in presence, not to an admin, not in a log, not in an error: neither a key nor the end of one."""
    monkeypatch.setenv("EMPTY", "")
    desk = await open_desk(api_keys=(*LABELS, "env:EMPTY"))
    heard: list[bytes] = []

    async def on_message(msg: Any) -> None:
        heard.append(msg.data)

    for subject in ("presence.>", "events.>"):
        await desk.ingress.connection.listen(subject, on_message)
    told = []
    for key in KEYS.values():
        mock.script_key(key, status=400, error={"message": f"{key} may not ask for this", "param": key, "code": key})
    with pytest.raises(openai.BadRequestError, match="may not ask for this") as refused:
        await desk.ask()
    told.append(str(refused.value.body))
    mock.script_key(ONE, status=429, error={"message": f"Rate limit reached for {ONE}"})
    mock.script_key(TWO, status=401, error={"message": f"Incorrect API key provided: {TWO}"})
    mock.script_key(THREE, status=403, error={"message": f"{THREE} is not allowed"})
    for _ in range(3):
        with pytest.raises(openai.APIStatusError) as caught:
            await desk.ask()
        told.append(str(caught.value.body))
    await eventually(lambda: any(b'"dead"' in data for data in heard), what="presence that tells of dead keys")
    told.append(msgspec.json.encode(await desk.route()).decode())
    told += [data.decode() for data in heard]
    out, err = capfd.readouterr()
    said = "\n".join([*told, out, err])
    assert "env:TWO" in said
    assert "can't be read" in said
    assert [key for key in KEYS.values() if key in said or key[-8:] in said.replace(key[-10:], "")] == []
