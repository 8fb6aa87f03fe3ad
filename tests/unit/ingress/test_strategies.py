"""In which order each strategy puts the places that a request may go to, and one within the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from ingress.policy.measured import Speed
from ingress.policy.strategies import Candidate, arrange
from schemas.ids import RouteId
from schemas.money import UNKNOWN, Price, Usage
from schemas.routing import STRATEGIES, Block


def candidate(route: str, **changes: Any) -> Candidate:
    usual = {"model": "m", "price": Price(input=1, output=1), "names": frozenset({route})}
    return Candidate(RouteId(route), **{**usual, **changes})


class Told:
    """Facts as a test tells them."""

    def __init__(
        self,
        *,
        usage: Usage | None = None,
        speeds: dict[str, Speed] | None = None,
        explored: str = "",
        slots: dict[str, tuple[int, int]] | None = None,
        used: dict[str, int] | None = None,
        dice: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self.usage = usage or Usage(prompt_tokens=1000, completion_tokens=100)
        self.dice = dice
        self._speeds = speeds or {}
        self._explored = explored
        self._slots = slots or {}
        self._used = used or {}

    def speed(self, candidate: Candidate) -> Speed | None:
        return self._speeds.get(candidate.route)

    def explores(self, candidate: Candidate) -> bool:
        return candidate.route == self._explored

    def slots(self, candidate: Candidate) -> tuple[int, int]:
        return self._slots[candidate.route]

    def last_minute(self, candidate: Candidate) -> int:
        return self._used.get(candidate.route, 0)


def order(candidates: list[Candidate], *strategy: str | Block, **told: Any) -> str:
    return " ".join(c.route for c, _ in arrange(candidates, strategy, Told(**told)))


def reasons(candidates: list[Candidate], *strategy: str | Block, **told: Any) -> list[str]:
    return [why for _, why in arrange(candidates, strategy, Told(**told))]


ABC = [candidate("a"), candidate("b"), candidate("c")]


def test_without_a_strategy_they_stay_as_they_are() -> None:
    assert order(ABC) == "a b c"


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "weighted"])
def test_those_that_are_alike_stay_as_they_are(name: str) -> None:
    slots = {"a": (1, 2), "b": (1, 2), "c": (1, 2)}
    assert order(ABC, name, slots=slots) == "a b c"
    assert order(ABC[::-1], name, slots=slots) == "c b a"


def test_ordered_is_the_operators_rank() -> None:
    ranked = [candidate("a", rank=2), candidate("b", rank=0), candidate("c")]
    assert order(ranked, "ordered") == "b a c"
    assert reasons(ranked, "ordered") == ["rank 0", "rank 2", "not ranked"]


def test_own_first() -> None:
    assert order([candidate("a"), candidate("b", own=True), candidate("c")], "own_first") == "b a c"
    assert reasons([candidate("a"), candidate("b", own=True)], "own_first") == ["own", "not own"]


def test_cheapest_goes_by_what_this_request_will_cost() -> None:
    """A long prompt with a short answer is cheap where prompts are, and the other way round."""
    prices = [
        candidate("prompts", price=Price(input=1, output=20)),
        candidate("answers", price=Price(input=3, output=5)),
    ]
    assert order(prices, "cheapest", usage=Usage(prompt_tokens=1000, completion_tokens=10)) == "prompts answers"
    assert order(prices, "cheapest", usage=Usage(prompt_tokens=10, completion_tokens=1000)) == "answers prompts"


def test_a_price_that_nobody_knows_is_the_dearest() -> None:
    dear = Price(input=10**30, output=10**30)
    found = [candidate("unknown", price=UNKNOWN), candidate("dear", price=dear), candidate("free", price=Price())]
    assert order(found, "cheapest") == "free dear unknown"
    assert reasons(found[::2], "cheapest") == ["free", "price unknown"]


def test_prices_are_compared_exactly() -> None:
    """A pico-dollar apart, where doubles would be the same."""
    big = 2**60
    found = [candidate("b", price=Price(input=big + 1)), candidate("a", price=Price(input=big))]
    assert order(found, "cheapest", usage=Usage(prompt_tokens=1)) == "a b"


def test_fastest_weighs_the_first_token_against_the_pace() -> None:
    speeds = {"soon": Speed(100_000, 10), "steady": Speed(1_000_000, 100)}
    found = [candidate("steady"), candidate("soon")]
    assert order(found, "fastest", speeds=speeds, usage=Usage(completion_tokens=5)) == "soon steady"
    assert order(found, "fastest", speeds=speeds, usage=Usage(completion_tokens=500)) == "steady soon"
    assert order(found, "latency", speeds=speeds) == "soon steady"
    assert order(found, "throughput", speeds=speeds) == "steady soon"
    assert reasons(found, "latency", speeds=speeds) == [
        "100 ms to the first token and 10 tokens/s",
        "1000 ms to the first token and 100 tokens/s",
    ]


def test_a_whole_answers_time_is_not_counted_twice() -> None:
    speeds = {"a": Speed(1_000_000, 100, whole=True), "b": Speed(1_500_000, math.inf, whole=True)}
    assert order([candidate("b"), candidate("a")], "fastest", speeds=speeds) == "a b"


def test_a_place_of_unknown_speed_is_last_unless_it_is_being_measured() -> None:
    speeds = {"b": Speed(100_000, 10)}
    assert order(ABC, "fastest", speeds=speeds) == "b a c"
    assert order(ABC, "fastest", speeds=speeds, explored="c") == "c b a"
    assert reasons(ABC, "fastest", speeds=speeds, explored="c")[0] == "tried to measure it"


def test_least_busy_goes_by_the_share_of_slots() -> None:
    slots = {"a": (4, 8), "b": (3, 4), "c": (0, 0)}
    assert order(ABC, "least_busy", slots=slots) == "a b c"
    assert reasons(ABC, "least_busy", slots=slots)[0] == "4 of 8 slots taken"


def test_usage_based_goes_by_the_share_of_the_limit() -> None:
    found = [candidate("a", tokens_per_minute=1000), candidate("b", tokens_per_minute=10_000), candidate("c")]
    used = {"a": 500, "b": 1000, "c": 700}
    assert order(found, "usage_based", used=used) == "c b a"
    assert reasons(found, "usage_based", used=used)[2] == "500 of 1000 tokens in the last minute"


def test_weighted_throws_dice() -> None:
    found = [candidate("a", weight=3), candidate("b", weight=1), candidate("never", weight=0)]
    throws = iter([0.9, 0.1, 0.5])
    assert order(found, "weighted", dice=lambda: next(throws)) == "b a never"


def test_one_strategy_within_the_other() -> None:
    found = [
        candidate("dear", price=Price(input=5)),
        candidate("slow", own=True, price=Price()),
        candidate("cheap", price=Price(input=1)),
        candidate("quick", own=True, price=Price()),
    ]
    assert order(found, "own_first", "cheapest") == "slow quick cheap dear"
    speeds = {"slow": Speed(900, 1), "quick": Speed(100, 1)}
    assert order(found, "own_first", "cheapest", "latency", speeds=speeds) == "quick slow cheap dear"
    assert reasons(found, "own_first", "cheapest")[:3:2] == ["own, free", "not own, $0.000001 in and $0 out"]


def test_what_hardly_differs_is_for_the_strategy_within() -> None:
    """A fifth slower is no reason to pay more, but half as fast again is."""
    found = [candidate("dear", price=Price(input=9)), candidate("cheap"), candidate("slow", price=Price())]
    speeds = {"dear": Speed(100_000, 10), "cheap": Speed(120_000, 10), "slow": Speed(150_000, 10)}
    assert order(found, "latency", speeds=speeds) == "dear cheap slow"
    assert order(found, "latency", "cheapest", speeds=speeds) == "cheap dear slow"


def test_a_block_has_an_order_of_its_own() -> None:
    found = [
        candidate("far", price=Price(input=1)),
        candidate("gpu1", own=True, price=Price()),
        candidate("near", price=Price(input=2)),
        candidate("gpu2", own=True, price=Price()),
    ]
    slots = {"gpu1": (3, 4), "gpu2": (0, 4)}
    own = Block(routes=("own",), strategy="least_busy")
    assert order(found, own, "cheapest", slots=slots) == "gpu2 gpu1 far near"
    assert reasons(found, own, slots=slots)[0] == "of own, 0 of 4 slots taken"
    inner = Block(routes=("near", "own"), strategy=(Block(routes=("near",)), "least_busy"))
    assert order(found, inner, slots=slots) == "near gpu2 gpu1 far"
