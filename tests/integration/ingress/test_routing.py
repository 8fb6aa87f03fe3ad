"""Where requests go, through the whole service: strategies, the request's own wishes, what a key allows, and cool-downs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from bus.server import EmbeddedServer
from schemas.money import Price
from schemas.routing import Block
from schemas.settings import ModelSettings, RoutingSettings, WorkerSettings
from tests.integration.ingress.gateway import ADMIN_KEY, CLIENT_KEY, MODEL, UPSTREAM_MODEL, bearer, sdk
from tests.integration.ingress.routes import Routes, routes_up
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)

OTHER = "other-model"
MESSAGES: Any = [{"role": "user", "content": "one two three"}]

OpenRoutes = Callable[..., Awaitable[Routes]]


def priced(dollars: str, *models: str) -> dict[str, Any]:
    """Settings of a route whose models cost so much, in and out."""
    micro = int(Decimal(dollars) * 10**6)
    price = Price(input=micro, output=micro)
    return {
        "models": tuple(ModelSettings(name=name, upstream=UPSTREAM_MODEL, price=price) for name in models or (MODEL,))
    }


PRICES = {"dear": priced("9"), "cheap": priced("0.1"), "middle": priced("1")}


@pytest.fixture
async def open_routes(nats_server: EmbeddedServer) -> AsyncIterator[OpenRoutes]:
    async with contextlib.AsyncExitStack() as stack:

        async def open_(*names: str, routing: Any = None, **settings: Any) -> Routes:
            routing = None if routing is None else RoutingSettings(**routing)
            return await stack.enter_async_context(routes_up(nats_server.url, *names, routing=routing, **settings))

        yield open_


class Answer:
    """What a client got."""

    def __init__(self, headers: Any, completion: Any) -> None:
        self.route = headers["x-penstock-route"]
        self.request_id = headers["x-request-id"]
        self.tried = headers.get("x-penstock-tried")
        self.model = completion.model
        self.text = completion.choices[0].message.content


async def ask(up: Routes, *, key: str = CLIENT_KEY, model: str = MODEL, **extra: Any) -> Answer:
    """With the official SDK; *extra* are members of the body that it doesn't know."""
    async with sdk(up.base_url, key) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, extra_body=extra or None
        )
        return Answer(raw.headers, raw.parse())


async def refused(up: Routes, *, key: str = CLIENT_KEY, model: str = MODEL, **extra: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(up, key=key, model=model, **extra)
    return caught.value


async def test_the_operators_strategy_orders_the_routes_and_the_event_says_why(open_routes: OpenRoutes) -> None:
    up = await open_routes(*PRICES, changes=PRICES, routing={"strategy": "cheapest"})
    answer = await ask(up)
    assert (answer.route, answer.model, answer.text) == ("cheap", MODEL, "one two three")
    (event,) = up.of(answer.request_id, "request.accepted")
    assert event["plan"] == ["cheap", "middle", "dear"]
    assert event["reasons"] == ["$0.1 in and $0.1 out", "$1 in and $1 out", "$9 in and $9 out"]


async def test_strategies_are_nested_and_a_model_may_have_its_own(open_routes: OpenRoutes) -> None:
    """All three mocks run on this machine, so `own` is stated."""
    changes = {
        "dear": {**priced("9", MODEL, OTHER), "own": True},
        "cheap": {**priced("0.1", MODEL, OTHER), "own": False},
        "middle": {**priced("1", MODEL, OTHER), "own": True},
    }
    routing = {
        "strategy": ("own_first", "cheapest"),
        "models": {OTHER: (Block(routes=("cheap",)), Block(routes=("own",), strategy="ordered"))},
    }
    up = await open_routes(*changes, changes=changes, routing=routing)
    answer = await ask(up)
    (event,) = up.of(answer.request_id, "request.accepted")
    assert event["plan"] == ["middle", "dear", "cheap"]
    answer = await ask(up, model=OTHER)
    (event,) = up.of(answer.request_id, "request.accepted")
    assert event["plan"] == ["cheap", "dear", "middle"]


@pytest.mark.parametrize(
    ("wishes", "plan"),
    [
        ({}, "dear cheap middle"),
        ({"sort": "price"}, "cheap middle dear"),
        ({"sort": {"by": "price", "partition": None}}, "cheap middle dear"),
        ({"order": ["middle", "dear"]}, "middle dear cheap"),
        ({"order": ["middle", "dear"], "allow_fallbacks": False}, "middle dear"),
        ({"order": ["Middle"], "sort": "price"}, "middle cheap dear"),
        ({"allow_fallbacks": False}, "dear"),
        ({"only": ["cheap", "middle"]}, "cheap middle"),
        ({"only": ["openai"], "ignore": ["dear", "groq"]}, "cheap middle"),
        ({"max_price": {"prompt": 1}}, "cheap middle"),
        ({"max_price": {"prompt": "1", "completion": 0.1}}, "cheap"),
        ({"require_parameters": True}, "cheap"),
        ({"data_collection": "allow", "zdr": False, "preferred_max_latency": 1}, "dear cheap middle"),
    ],
)
async def test_the_requests_own_provider_is_honoured(open_routes: OpenRoutes, wishes: Any, plan: str) -> None:
    changes = {**PRICES, "cheap": {**PRICES["cheap"], "parameters": ("temperature",)}}
    up = await open_routes(*PRICES, changes=changes)
    answer = await ask(up, provider=wishes, temperature=0)
    assert answer.route == plan.split(maxsplit=1)[0]
    (event,) = up.of(answer.request_id, "request.accepted")
    assert " ".join(event["plan"]) == plan
    assert {*event["plan"], *(entry["route"] for entry in event["left_out"])} == set(PRICES)


@pytest.mark.parametrize(
    ("wishes", "told", "param", "said"),
    [
        ({"only": ["typo"]}, "400 invalid_request", "provider.only[0]", "There are: cheap, dear, middle, openai."),
        ({"ignore": ["typo"]}, "400 invalid_request", "provider.ignore[0]", "no route and no provider of this name"),
        ({"order": ["cheap", "typo"]}, "400 invalid_request", "provider.order[1]", "no route and no provider"),
        ({"only": []}, "400 invalid_request", "provider.only", "it is empty"),
        ({"data_collection": "deny"}, "400 invalid_request", "provider.data_collection", "can be honoured"),
        ({"zdr": True}, "400 invalid_request", "provider.zdr", "can't be honoured"),
        ({"max_price": {"prompt": -1}}, "400 invalid_request", "provider.max_price.prompt", "zero or more"),
        ({"max_price": {"prompt": 0}}, "404 no_allowed_route", "provider", "cheap (over provider.max_price)"),
        ({"only": ["groq"]}, "404 no_allowed_route", "provider", "dear (not in provider.only)"),
        ({"quantizations": ["fp8"]}, "404 no_allowed_route", "provider", "dear (quantization unknown)"),
        ({"require_parameters": True}, "404 no_allowed_route", "provider", "not known which parameters"),
    ],
)
async def test_wishes_that_can_not_be_met_say_so(
    open_routes: OpenRoutes, wishes: Any, told: str, param: str, said: str
) -> None:
    up = await open_routes(*PRICES, changes=PRICES)
    error = await refused(up, provider=wishes, temperature=0)
    assert (f"{error.status_code} {error.code}", error.param) == (told, param)
    assert said in error.message
    (event,) = up.of(None, "request.rejected")
    assert f"{event['http_status']} {event['code']}" == told
    assert {entry["route"] for entry in event["left_out"]} == (set(PRICES) if "404" in told else set())
    assert not any(place.mock.seen for place in up.places.values())


async def test_a_route_that_is_allowed_but_away_may_come_back(open_routes: OpenRoutes) -> None:
    up = await open_routes("first", "second")
    await up.places["first"].worker.drain()
    await eventually(lambda: "first" not in up.ingress.fleet.offers(MODEL))
    error = await refused(up, provider={"only": ["first"]})
    assert (error.status_code, error.code) == (503, "no_live_route")
    assert error.response.headers["retry-after"]


async def test_models_are_fallen_back_on_and_the_answer_says_which_one_it_is_of(open_routes: OpenRoutes) -> None:
    changes = {"first": priced("1", MODEL), "second": priced("2", OTHER)}
    up = await open_routes("first", "second", changes=changes)
    up.mock("first").script(status=500)
    answer = await ask(up, models=[OTHER, "no-such-model"], provider={"sort": "price"})
    assert (answer.route, answer.model, answer.text) == ("second", OTHER, "one two three")
    (event,) = up.of(answer.request_id, "request.accepted")
    assert (event["model"], event["plan"], event["models"]) == (MODEL, ["first", "second"], [MODEL, OTHER])
    assert event["left_out"] == [{"route": "", "model": "no-such-model", "why": "no such model here"}]
    ending = await up.ending(answer.request_id)
    assert (ending["model"], ending["route"], ending["price"]["input"]) == (OTHER, "second", 2_000_000)
    (seen,) = up.mock("second").seen
    assert set(seen.body) == {"model", "messages"}


async def test_a_stream_names_the_model_that_answers_too(open_routes: OpenRoutes) -> None:
    up = await open_routes("first", "second", changes={"first": priced("1", MODEL), "second": priced("2", OTHER)})
    up.mock("first").script(reset=True)
    async with sdk(up.base_url) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, extra_body={"models": [OTHER]}
        )
        models = {chunk.model async for chunk in stream}
    assert models == {OTHER}


async def test_models_alone_will_do(open_routes: OpenRoutes) -> None:
    up = await open_routes("first")
    async with aiohttp.ClientSession() as session:
        given = {"models": ["no-such-model", MODEL], "messages": MESSAGES}
        async with session.post(up.chat_url, json=given, headers=bearer()) as response:
            assert (response.status, (await response.json())["model"]) == (200, MODEL)


async def make_key(up: Routes, **given: Any) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        url = up.base_url.removesuffix("/v1") + "/admin/v1/keys"
        async with session.post(url, json=given, headers=bearer(ADMIN_KEY)) as response:
            made: dict[str, Any] = await response.json()
            assert response.status == 201, made
            return made


async def test_a_key_is_held_to_its_models_routes_and_price(open_routes: OpenRoutes) -> None:
    changes = {"dear": priced("9", MODEL, OTHER), "cheap": priced("0.1", MODEL, OTHER), "middle": priced("1", MODEL)}
    up = await open_routes(*changes, changes=changes)
    made = await make_key(
        up, models=[MODEL], routes=["cheap", "dear"], max_price={"prompt": 1.5, "completion": "2.000001"}
    )
    assert (made["models"], made["routes"]) == ([MODEL], ["cheap", "dear"])
    assert made["max_price"] == {"prompt": "1.500000", "completion": "2.000001"}
    key = made["key"]
    answer = await ask(up, key=key)
    (event,) = up.of(answer.request_id, "request.accepted")
    assert event["plan"] == ["cheap"]
    assert {entry["route"]: entry["why"] for entry in event["left_out"]} == {
        "dear": "its key may not use a route of this price",
        "middle": "its key may not use this route",
    }
    error = await refused(up, key=key, model=OTHER)
    assert (error.status_code, error.code) == (403, "insufficient_permissions")
    error = await refused(up, key=key, provider={"only": ["dear"]})
    assert (error.status_code, error.code) == (404, "no_allowed_route")
    error = await refused(up, key=key, provider={"max_price": {"prompt": 0}})
    assert (error.status_code, error.code) == (404, "no_allowed_route")
    async with sdk(up.base_url, key) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve(OTHER)


class Clock:
    """The router's, which a test can put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


async def test_a_place_that_fails_is_left_alone_until_one_probe_is_answered(open_routes: OpenRoutes) -> None:
    """Twenty requests at a time: while it cools down none goes there, and when its time is over just one."""
    clock = Clock()
    cooldown = {"cooldown_s": 100.0, "cooldown_max_s": 400.0}
    once = WorkerSettings(drain_s=0.2, tries=1)
    up = await open_routes("first", "second", routing=cooldown, worker=once, clock=clock)
    first = up.mock("first")

    async def twenty() -> Counter[str]:
        return Counter(answer.route for answer in await asyncio.gather(*(ask(up) for _ in range(20))))

    first.script(status=500)
    answer = await ask(up)
    assert (answer.route, answer.tried) == ("second", "first;code=upstream_error;status=500")
    first.forget()
    assert await twenty() == {"second": 20}
    assert len(first.seen) == 0
    accepted = up.of(None, "request.accepted")[-1]
    assert accepted["plan"] == ["second", "first"]
    assert "cooling" in accepted["reasons"][1]
    assert "upstream_error" in accepted["reasons"][1]
    async with aiohttp.ClientSession() as session:
        url = up.base_url.removesuffix("/v1") + "/admin/v1/routes"
        async with session.get(url, headers=bearer(ADMIN_KEY)) as response:
            rows = {row["route"]: row["left_alone"] for row in (await response.json())["data"]}
    assert rows["second"] == []
    (told,) = rows["first"]
    assert told.startswith(f"{MODEL}: cooling for ")

    first.script(delay_s=0.4, status=500)  # the probe is out while the others come
    clock.ahead_s += 100
    assert await twenty() == {"second": 20}
    assert len(first.seen) == 1

    first.forget()
    first.script()
    clock.ahead_s += 100
    assert await twenty() == {"second": 20}  # twice as long this time
    assert len(first.seen) == 0
    clock.ahead_s += 100
    assert (await ask(up)).route == "first"
    assert await twenty() == {"first": 20}


async def test_a_route_whose_limits_are_used_up_comes_after_the_others(open_routes: OpenRoutes) -> None:
    up = await open_routes("first", "second", changes={"first": {"requests_per_minute": 2}})
    assert [(await ask(up)).route for _ in range(2)] == ["first", "first"]
    await eventually(lambda: up.ingress.fleet.load("first").is_held, what="presence that says so")  # type: ignore[arg-type]
    assert {(await ask(up)).route for _ in range(5)} == {"second"}
    accepted = up.of(None, "request.accepted")[-1]
    assert accepted["plan"] == ["second", "first"]
    assert "its 2 requests a minute are used up" in accepted["reasons"][1]


async def test_a_place_that_cools_is_better_than_none(open_routes: OpenRoutes) -> None:
    up = await open_routes("first", routing={"cooldown_s": 30.0})
    up.mock("first").script(status=500)
    assert (await refused(up)).status_code == 502
    up.mock("first").script()
    assert (await ask(up)).route == "first"


async def test_fastest_finds_the_fastest_and_follows_when_that_changes(open_routes: OpenRoutes) -> None:
    up = await open_routes("slow", "quick", routing={"strategy": "fastest"})
    up.mock("slow").script(delay_s=1.0)
    routes = [(await ask(up)).route for _ in range(6)]
    assert set(routes[:2]) == {"slow", "quick"}  # each once, to find out
    assert set(routes[2:]) == {"quick"}
    up.mock("quick").script(delay_s=3.0)
    up.mock("slow").script()
    routes = []
    while "slow" not in routes:  # a mean takes a few answers to follow
        routes.append((await ask(up)).route)
        assert len(routes) <= 6


async def test_least_busy_spreads_what_this_ingress_sends(open_routes: OpenRoutes) -> None:
    """Faster than workers tell of their slots."""
    up = await open_routes("one", "two", routing={"strategy": "least_busy"})
    for name in ("one", "two"):
        up.mock(name).script(delay_s=2.0)  # so that none has ended when the last begins
    answers = await asyncio.gather(*(ask(up) for _ in range(12)))
    assert Counter(answer.route for answer in answers) == {"one": 6, "two": 6}


async def test_a_route_without_weight_is_only_for_when_the_others_fail(open_routes: OpenRoutes) -> None:
    changes = {"all": {"weight": 5}, "none": {"weight": 0}}
    up = await open_routes("none", "all", changes=changes, routing={"strategy": "weighted"})
    assert {(await ask(up)).route for _ in range(8)} == {"all"}


async def test_usage_goes_where_the_limit_is_far(open_routes: OpenRoutes) -> None:
    changes = {"small": {"tokens_per_minute": 10}, "big": {"tokens_per_minute": 100_000}}
    up = await open_routes("small", "big", changes=changes, routing={"strategy": "usage_based"})
    assert [(await ask(up)).route for _ in range(4)] == ["small", "big", "big", "big"]


async def test_what_travels_to_the_provider_is_the_body_without_what_was_for_us(open_routes: OpenRoutes) -> None:
    up = await open_routes("first")
    ours = b'"provider":{"sort":"price"},'
    rest = (
        b'"model":"%b","temperature":1.0e0,"messages":[{"role":"user","content":"\\u0041"}],"x":{"y":1.50}'
        % MODEL.encode()
    )
    async with aiohttp.ClientSession() as session:
        sent = b"{" + ours + rest + b"}"
        headers = bearer() | {"content-type": "application/json"}
        async with session.post(up.chat_url, data=sent, headers=headers) as response:
            assert response.status == 200, await response.text()
    (seen,) = up.mock("first").seen
    assert seen.body == msgspec.json.decode(b"{" + rest + b"}") | {"model": UPSTREAM_MODEL}
