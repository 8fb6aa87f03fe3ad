"""Plans from what is announced, stated and seen: what is kept, what changes them, and what attempts teach."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ingress.policy.measured import EXPLORE_EVERY_S
from ingress.policy.routing import Leg, Plan
from ingress.router import Router
from schemas import codec
from schemas.chat import decode_request
from schemas.control import PublicModel, RouteStated
from schemas.errors import (
    BadRequest,
    Forbidden,
    NoAllowedRoute,
    NoLiveRoute,
    PenstockError,
    ProviderAuth,
    ProviderFailed,
    ProviderRateLimited,
    ProviderRejected,
    TotalTimeout,
    WorkerLost,
)
from schemas.ids import EventId, KeyId, RouteId, WorkerId
from schemas.jobs import ModelFingerprint, ModelOffer, RouteOffer, WorkerState
from schemas.money import UNKNOWN, Price, PriceCap
from schemas.settings import RoutingSettings
from tests.unit.ingress.doubles import BODY, MODEL, WORKER, Control, Fleet, Message, Wall, presence

OTHER = WorkerId("worker-b")
OFFERED = Price(input=10, output=100)


class Deployment:
    """A router, and what it hears of."""

    def __init__(self, **settings: Any) -> None:
        self.now = 1000.0
        self.dice = 0.5
        self.fleet = Fleet(Wall())  # type: ignore[arg-type]
        self.control = Control()
        self.router = Router(
            self.fleet,
            self.control,  # type: ignore[arg-type]
            RoutingSettings(**settings),
            clock=lambda: self.now,
            dice=lambda: self.dice,
        )

    async def hears(self, *routes: RouteOffer | str, worker: WorkerId = WORKER, **changes: Any) -> None:
        offers = tuple(offer(route) if isinstance(route, str) else route for route in routes)
        said = presence(worker, routes=(), **changes)
        said = msgspec.structs.replace(said, routes=offers)
        await self.fleet._on_presence(Message("presence.x", codec.encode(said)))  # type: ignore[arg-type]

    def states(self, route: str, **changes: Any) -> None:
        self.control.say(
            RouteStated(
                **{
                    "id": EventId("e"),
                    "ts_ns": 0,
                    "by": "test",
                    "producer": "test",
                    "route": RouteId(route),
                    "provider": "p",
                    "models": (PublicModel(name=MODEL),),
                    **changes,
                }
            )
        )

    def plan(self, *, key: dict[str, Any] | None = None, **members: Any) -> Plan:
        body = msgspec.json.encode(msgspec.json.decode(BODY) | members)
        mine = msgspec.structs.replace(self.control.state.keys[KeyId("key_1")], **(key or {}))
        return self.router.plan(decode_request(body), mine, body)

    def goes(self, leg: Leg, *, after_s: float, tokens: int = 1, takes_s: float = 0.0) -> None:
        """An attempt at *leg* that speaks after so long, and takes so much longer."""
        trip = self.router.begin(leg, stream=False)
        self.now += after_s
        trip.spoke()
        self.now += takes_s
        trip.ended(tokens)

    def fails(self, leg: Leg, error: PenstockError) -> None:
        trip = self.router.begin(leg, stream=False)
        trip.failed(error)
        trip.ended(0)


def offer(route: str, **changes: Any) -> RouteOffer:
    usual = {"provider": "p", "slots": 2, "free": 2, "models": (ModelOffer(name=MODEL, price=OFFERED),)}
    return RouteOffer(**{"route": RouteId(route), **usual, **changes})


async def test_with_one_route_the_plan_is_made_once_and_kept() -> None:
    made = Deployment()
    await made.hears("a")
    plan = made.plan()
    assert plan.legs == (Leg(RouteId("a"), MODEL, OFFERED),)
    assert made.plan() is plan
    await made.hears("a")  # the next beat
    assert made.plan() is plan


async def test_what_changes_an_offer_or_a_statement_changes_the_plan() -> None:
    made = Deployment()
    await made.hears("a")
    assert made.plan().routes == ("a",)
    await made.hears("b", worker=OTHER)
    assert made.plan().routes == ("a", "b")
    made.states("b", rank=0)
    assert made.plan().routes == ("b", "a")
    made.states("b", rank=0, models=(PublicModel(name=MODEL, price=Price(input=7)),))
    assert made.plan().legs[0].price == Price(input=7)
    made.states("b", rank=0, models=(PublicModel(name=MODEL, price=UNKNOWN),))
    assert made.plan().legs[0].price == OFFERED
    await made.hears(worker=OTHER, state=WorkerState.GONE)
    assert made.plan().routes == ("a",)


async def test_a_removed_route_that_is_still_served_has_its_workers_price() -> None:
    made = Deployment()
    await made.hears("a")
    made.states("a", removed=True, models=(PublicModel(name=MODEL, price=Price(input=7)),))
    assert made.plan().legs[0].price == OFFERED


async def test_a_model_that_is_only_stated_is_away() -> None:
    made = Deployment()
    made.states("a")
    with pytest.raises(NoLiveRoute):
        made.plan()
    with pytest.raises(NoLiveRoute):
        made.plan(provider={"only": ["a"]})
    with pytest.raises(BadRequest, match="There are: a, p"):
        made.plan(provider={"only": ["b"]})


async def test_why_a_model_is_away_is_told() -> None:
    made = Deployment()
    await made.hears(offer("a", down="engine_starting"))
    with pytest.raises(NoLiveRoute, match="at the moment: engine_starting"):
        made.plan()


async def test_own_is_what_the_worker_says_and_of_an_older_one_what_its_provider_means() -> None:
    made = Deployment(strategy="own_first")
    await made.hears(
        offer("a"), offer("b", own=True), offer("c", provider="vllm"), offer("d", provider="vllm", own=False)
    )
    assert made.plan().routes == ("b", "c", "a", "d")
    assert made.plan(provider={"only": ["own"]}).routes == ("b", "c")


async def test_two_workers_of_a_route_are_one_place_and_what_holds_for_both_holds() -> None:
    made = Deployment()

    def one(quantisation: str | None, *parameters: str, own: bool) -> RouteOffer:
        fingerprint = ModelFingerprint(name="m", quantisation=quantisation)
        models = (ModelOffer(name=MODEL, price=OFFERED, fingerprint=fingerprint),)
        return offer("a", models=models, parameters=parameters, own=own)

    await made.hears(one("FP8", "seed", "stop", own=True))
    assert made.plan(provider={"quantizations": ["fp8"], "require_parameters": True}, seed=1).routes == ("a",)
    await made.hears(one(None, "stop", own=False), worker=OTHER)
    assert made.plan().routes == ("a",)
    with pytest.raises(NoAllowedRoute, match="quantization fp8 or unknown"):
        made.plan(provider={"quantizations": ["fp8"]})
    assert made.plan(provider={"quantizations": ["fp8", "unknown"]}).routes == ("a",)
    with pytest.raises(NoAllowedRoute, match="not known to honour seed"):
        made.plan(provider={"require_parameters": True}, seed=1)
    with pytest.raises(NoAllowedRoute):
        made.plan(provider={"only": ["own"]})


async def test_a_key_without_limits_is_as_good_as_none_and_one_with_them_is_held() -> None:
    made = Deployment()
    await made.hears("a", "b")
    assert made.plan(key={"models": (MODEL,), "routes": ("B",)}).routes == ("b",)
    with pytest.raises(Forbidden):
        made.plan(key={"models": ()})
    with pytest.raises(Forbidden):
        made.plan(key={"max_price": PriceCap(prompt=9)})
    assert made.plan(key={"max_price": PriceCap(prompt=10)}).routes == ("a", "b")


async def test_a_mistake_lists_what_there_is_as_far_as_the_key_may_know() -> None:
    made = Deployment()
    await made.hears(*(f"r{i:02}" for i in range(25)))
    with pytest.raises(BadRequest, match=r"There are: p, r00, r01, .*, r18, …\."):
        made.plan(provider={"ignore": ["typo"]})
    with pytest.raises(BadRequest, match=r"There are: r03\."):
        made.plan(provider={"ignore": ["typo"]}, key={"routes": ("R03",)})


@pytest.mark.parametrize("error", [ProviderAuth(), ProviderRateLimited(retry_after_s=5.0), ProviderFailed()])
async def test_a_fault_puts_its_place_last_and_an_answer_back(error: PenstockError) -> None:
    made = Deployment()
    await made.hears("a", "b")
    first = made.plan().legs[0]
    assert made.router.is_up(first)
    made.fails(first, error)
    assert not made.router.is_up(first)
    assert made.plan().routes == ("b", "a")
    assert error.code in made.plan().legs[1].why
    made.now += 5.0
    assert made.plan().routes == ("a", "b")
    assert "due for a probe" in made.plan().legs[0].why
    probe = made.router.begin(first, stream=False)
    assert probe.is_probe
    assert made.plan().routes == ("b", "a")
    probe.spoke()
    assert made.plan().routes == ("a", "b")
    probe.ended(3)


@pytest.mark.parametrize("error", [ProviderRejected(), WorkerLost(), TotalTimeout(), PenstockError()])
async def test_what_is_not_the_places_fault_does_not_count(error: PenstockError) -> None:
    made = Deployment()
    await made.hears("a", "b")
    for _ in range(5):
        made.fails(made.plan().legs[0], error)
    assert made.plan().routes == ("a", "b")


async def test_a_place_that_has_no_such_model_is_left_alone() -> None:
    made = Deployment()
    await made.hears("a", "b")
    made.fails(made.plan().legs[0], ProviderRejected(status=404))
    assert made.plan().routes == ("b", "a")


async def test_answers_that_go_well_make_up_for_faults_and_those_that_break_do_not() -> None:
    made = Deployment()
    await made.hears("a", "b")
    leg = made.plan().legs[0]
    made.goes(leg, after_s=0.1)
    for _ in range(2):
        made.fails(leg, ProviderFailed())
    made.goes(leg, after_s=0.1)
    for _ in range(2):
        trip = made.router.begin(leg, stream=True)
        trip.spoke()
        trip.failed(ProviderFailed())
        trip.ended(5)
    assert made.router.is_up(leg)
    made.fails(leg, ProviderFailed())
    assert not made.router.is_up(leg)


async def test_a_probe_that_is_dropped_leaves_its_turn_to_the_next() -> None:
    made = Deployment()
    await made.hears("a", "b")
    first = made.plan().legs[0]
    made.fails(first, ProviderFailed())
    made.now += 1.0
    made.fails(first, ProviderRejected())
    assert made.router.begin(first, stream=False).is_probe


async def test_the_end_of_a_trip_counts_once() -> None:
    made = Deployment()
    await made.hears("a")
    trip = made.router.begin(made.plan().legs[0], stream=False)
    trip.ended(1)
    trip.ended(1)
    trip.spoke()
    trip.failed(ProviderFailed())
    assert made.router.is_up(trip.leg)
    assert made.fleet.load(RouteId("a")).running == 0


async def test_unknown_places_are_tried_once_in_a_while_until_they_are_known() -> None:
    made = Deployment(strategy="latency")
    await made.hears("a", "b", "c")
    found = [made.plan().routes[0] for _ in range(5)]
    assert found == ["a", "b", "c", "a", "a"]  # each once, and then in the operator's order
    by_route = {leg.route: leg for leg in made.plan().legs}
    made.goes(by_route[RouteId("b")], after_s=0.5)
    made.goes(by_route[RouteId("c")], after_s=0.2)
    assert made.plan().routes == ("c", "b", "a")
    made.now += EXPLORE_EVERY_S
    assert [made.plan().routes[0] for _ in range(3)] == ["a", "c", "c"]
    made.now += 1000  # long forgotten
    assert sorted(made.plan().routes[0] for _ in range(3)) == ["a", "b", "c"]


async def test_a_place_that_cools_is_not_explored() -> None:
    made = Deployment(strategy="latency", cooldown_s=60.0)
    await made.hears("a", "b")
    made.fails(made.plan().legs[0], ProviderFailed())
    assert made.plan().routes == ("b", "a")
    assert made.plan().routes == ("b", "a")


async def test_the_load_is_what_workers_say_and_what_began_since() -> None:
    made = Deployment(strategy="least_busy")
    await made.hears(offer("a", slots=10, free=8), offer("b", slots=10, free=5))
    assert made.plan().legs[0].why == "2 of 10 slots taken"
    trips = [made.router.begin(made.plan().legs[0], stream=False) for _ in range(6)]
    assert {trip.leg.route for trip in trips} == {"a", "b"}
    running = sum(trip.leg.route == "a" for trip in trips)
    assert made.fleet.load(RouteId("a")).taken == 2 + running
    await made.hears(offer("a", slots=10, free=8 - running), offer("b", slots=10, free=5))
    assert made.fleet.load(RouteId("a")).taken == 2 + running
    for trip in trips:
        trip.ended(0)
    assert made.fleet.load(RouteId("a")).taken == 2
    await made.hears(offer("a", slots=10, free=10), worker=OTHER)
    assert made.fleet.load(RouteId("a")).slots == 20
    await made.hears(offer("a", slots=10, free=10), worker=OTHER, state=WorkerState.DRAINING)
    assert made.fleet.load(RouteId("a")).slots == 10
    await made.hears(worker=OTHER, state=WorkerState.GONE)
    assert made.fleet.load(RouteId("a")).slots == 10
    await made.hears(state=WorkerState.GONE)
    assert not made.fleet._loads


async def test_a_route_whose_jobs_wait_for_its_limits_is_a_last_resort() -> None:
    """Unless another of its workers takes them."""
    made = Deployment()
    await made.hears(offer("a", held="rate_limited"), offer("b"))
    plan = made.plan()
    assert plan.routes == ("b", "a")
    assert plan.legs[1].why == "not ranked; its jobs wait: rate_limited"
    assert not made.router.is_up(plan.legs[1])
    await made.hears("a", worker=OTHER)
    assert made.plan().routes == ("a", "b")
    await made.hears(worker=OTHER, state=WorkerState.GONE)
    assert made.plan().routes == ("b", "a")
    await made.hears("a", "b")
    assert made.plan().routes == ("a", "b")


async def test_usage_is_what_was_answered_in_the_last_minute() -> None:
    made = Deployment(strategy="usage_based")
    await made.hears("a", "b")
    made.states("a", rank=0, tokens_per_minute=1000)
    made.states("b", rank=1, tokens_per_minute=1000)
    made.goes(made.plan().legs[0], after_s=0.1, tokens=50)
    assert made.plan().routes == ("b", "a")
    made.now += 70
    assert made.plan().routes == ("a", "b")


async def test_a_hedge_can_ask_how_long_a_first_token_takes() -> None:
    made = Deployment()
    await made.hears("a")
    leg = made.plan().legs[0]
    assert made.router.p95_ttft_us(leg, stream=False) is None
    for _ in range(30):
        made.goes(leg, after_s=0.2)
    p95_us = made.router.p95_ttft_us(leg, stream=False)
    assert p95_us is not None
    assert 200_000 <= p95_us <= 231_000
    assert made.router.p95_ttft_us(leg, stream=True) is None


async def test_a_request_names_at_most_what_is_served() -> None:
    """Names of models that nobody serves are not kept."""
    made = Deployment()
    await made.hears("a")
    made.plan()
    for i in range(50):
        made.plan(models=[f"x{i}"])
    assert set(made.router._served) == {MODEL}
