"""Which places a request may go to, why not the others, and what is said when none is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ingress.policy.routing import LEFT_OUT_MAX, LEGS_MAX, Asked, Plan, Rules, plan
from ingress.policy.strategies import Candidate
from schemas.errors import Forbidden, ModelNotFound, NoAllowedRoute, NoLiveRoute
from schemas.ids import RouteId
from schemas.money import UNKNOWN, Price, PriceCap
from tests.unit.ingress.test_strategies import Told, candidate

A, B, C = candidate("a", rank=0), candidate("b", rank=1), candidate("c", rank=2)


class Standings:
    """Who cools, and why."""

    def __init__(self, **cooling: str) -> None:
        self._cooling = cooling

    def is_open(self, route: RouteId, model: str) -> bool:  # noqa: ARG002
        return route not in self._cooling

    def why(self, route: RouteId, model: str) -> str:  # noqa: ARG002
        return self._cooling.get(route, "")


def made(
    *candidates: Candidate,
    rules: Rules | None = None,
    asked: Sequence[Asked] = (),
    orders: Any = None,
    cooling: dict[str, str] | None = None,
    **about: Any,
) -> Plan:
    asked = asked or [Asked("m", candidates, **about)]
    orders = orders or [("ordered",) for _ in asked]
    return plan(asked, rules or Rules(), orders=orders, facts=Told(), standings=Standings(**(cooling or {})))


def told(plan: Plan) -> dict[str, str]:
    return {entry.route: entry.why for entry in plan.left_out}


def test_a_plan_has_a_leg_for_each_place_in_order_with_its_price_and_reason() -> None:
    found = made(C, A)
    assert [(leg.route, leg.model, leg.price, leg.why) for leg in found.legs] == [
        ("a", "m", A.price, "rank 0"),
        ("c", "m", C.price, "rank 2"),
    ]
    assert found.left_out == ()
    assert found.routes == ("a", "c")


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (Rules(only=frozenset({"a"})), {"b": "not in provider.only", "c": "not in provider.only"}),
        (Rules(ignore=frozenset({"b", "c"})), {"b": "in provider.ignore", "c": "in provider.ignore"}),
        (
            Rules(first=("a",), fallbacks=False),
            {
                "b": "not in provider.order, and no fallbacks are allowed",
                "c": "not in provider.order, and no fallbacks are allowed",
            },
        ),
        (Rules(fallbacks=False), {"b": "no fallbacks are allowed", "c": "no fallbacks are allowed"}),
        (
            Rules(key_routes=frozenset({"a"})),
            {"b": "its key may not use this route", "c": "its key may not use this route"},
        ),
    ],
)
def test_the_others_are_left_out_with_the_reason(rules: Rules, left: dict[str, str]) -> None:
    found = made(A, B, C, rules=rules)
    assert found.routes == ("a",)
    assert told(found) == left


@pytest.mark.parametrize(
    ("price", "cap", "why"),
    [
        (Price(input=5, output=9), PriceCap(prompt=5, completion=9), None),
        (Price(input=5, output=9), PriceCap(completion=9), None),
        (Price(input=6, output=9), PriceCap(prompt=5), "over provider.max_price"),
        (Price(input=5, output=9), PriceCap(completion=8), "over provider.max_price"),
        (Price(input=5, output=9, reasoning=12), PriceCap(completion=9), "over provider.max_price"),
        (Price(), PriceCap(prompt=0, completion=0), None),
        (Price(output=1), PriceCap(prompt=0, completion=0), "over provider.max_price"),
        (UNKNOWN, PriceCap(prompt=10**9), "price unknown"),
        (UNKNOWN, PriceCap(), None),
    ],
)
def test_no_more_is_paid_than_was_allowed(price: Price, cap: PriceCap, why: str | None) -> None:
    other = candidate("b", price=Price())
    found = made(candidate("a", price=price), other, rules=Rules(cap=cap))
    assert told(found).get("a") == why
    as_key = made(candidate("a", price=price), other, rules=Rules(key_cap=cap))
    assert (told(as_key).get("a") or "").startswith("its key may not use" if why else "")


def test_quantizations_are_those_of_all_machines_of_a_route() -> None:
    found = made(
        candidate("a", quantisations=frozenset({"fp8"})),
        candidate("b", quantisations=frozenset({"fp8", "int4"})),
        candidate("c", quantisations=frozenset({"unknown"})),
        candidate("d"),
        rules=Rules(quantisations=frozenset({"fp8", "bf16"})),
    )
    assert found.routes == ("a",)
    assert told(found)["b"] == "quantization fp8 or int4"
    assert told(found)["d"] == "quantization unknown"


def test_parameters_have_to_be_known_to_be_honoured() -> None:
    found = made(
        candidate("a", parameters=frozenset({"seed", "stop"})),
        candidate("b", parameters=frozenset({"stop"})),
        candidate("c"),
        rules=Rules(parameters=frozenset({"seed"})),
    )
    assert found.routes == ("a",)
    assert told(found) == {"b": "not known to honour seed", "c": "not known which parameters it honours"}


def test_places_in_the_requests_order_come_first_and_the_others_after() -> None:
    found = made(A, B, C, rules=Rules(first=("c", "nobody", "b")))
    assert found.routes == ("c", "b", "a")
    assert [leg.why for leg in found.legs] == ["in provider.order", "in provider.order", "rank 0"]


def test_a_place_that_cools_is_the_last_resort() -> None:
    found = made(A, B, C, cooling={"a": "cooling for 1.0 s more after upstream_error"})
    assert found.routes == ("b", "c", "a")
    assert found.legs[-1].why == "rank 0; cooling for 1.0 s more after upstream_error"
    assert made(A, cooling={"a": "cooling"}).routes == ("a",)
    assert made(A, B, rules=Rules(fallbacks=False), cooling={"a": "cooling"}).routes == ("b",)


def asked(model: str, *routes: str, **changes: Any) -> Asked:
    return Asked(model, tuple(candidate(route, model=model, **changes) for route in routes))


def legs(plan: Plan) -> str:
    return " ".join(f"{leg.route}:{leg.model}" for leg in plan.legs)


def test_models_to_fall_back_on_come_after_all_places_of_the_first() -> None:
    found = made(asked=[asked("m", "a", "b"), asked("n", "b", "c")])
    assert legs(found) == "a:m b:m b:n c:n"
    assert legs(made(asked=[asked("m", "a", "b"), asked("n", "b")], cooling={"b": "x"})) == "a:m b:m b:n"
    assert legs(made(asked=[asked("m", "a", "b"), asked("n", "b")], rules=Rules(fallbacks=False))) == "a:m b:n"


def test_a_model_that_cools_everywhere_comes_after_its_fallbacks() -> None:
    assert legs(made(asked=[asked("m", "a"), asked("n", "b")], cooling={"a": "x"})) == "b:n a:m"


def test_models_can_be_put_in_order_together() -> None:
    dear = asked("m", "a", price=Price(input=9))
    assert legs(made(asked=[dear, asked("n", "b")], orders=[("cheapest",)])) == "b:n a:m"
    assert legs(made(asked=[dear, asked("n", "b")], orders=[("cheapest",), ("cheapest",)])) == "a:m b:n"


def test_a_fallback_that_is_not_there_is_left_out() -> None:
    found = made(asked=[asked("m", "a"), Asked("n", ())])
    assert legs(found) == "a:m"
    assert [(entry.route, entry.model, entry.why) for entry in found.left_out] == [("", "n", "no such model here")]


def test_both_lists_are_bounded() -> None:
    found = made(*(candidate(f"r{i:02}") for i in range(LEGS_MAX + LEFT_OUT_MAX + 5)))
    assert len(found.legs) == LEGS_MAX
    assert len(found.left_out) == LEFT_OUT_MAX
    assert found.left_out[0].why == f"beyond the first {LEGS_MAX}"


def test_a_model_that_never_was_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="The model 'm' does not exist here") as caught:
        made()
    assert caught.value.param == "model"
    with pytest.raises(ModelNotFound, match="The models 'm' and 'n' do not exist here"):
        made(asked=[Asked("m", ()), Asked("n", ())])


def test_a_model_that_was_served_is_only_away_and_why_is_told() -> None:
    with pytest.raises(NoLiveRoute) as caught:
        made(away=(A,))
    assert caught.value.param == "model"
    with pytest.raises(NoLiveRoute, match=r"at the moment: the provider fails \(HTTP 500\)\.$"):
        made(away=(A,), why_away="the provider fails (HTTP 500).")


def test_an_allowed_place_that_is_away_may_come_back() -> None:
    with pytest.raises(NoLiveRoute):
        made(B, rules=Rules(only=frozenset({"a"})), away=(A,))
    with pytest.raises(NoAllowedRoute):
        made(B, rules=Rules(only=frozenset({"a"})), away=(C,))


def test_rules_that_leave_nothing_are_named() -> None:
    with pytest.raises(NoAllowedRoute) as caught:
        made(A, candidate("b", price=UNKNOWN), rules=Rules(cap=PriceCap(prompt=0)))
    assert caught.value.message == ("No route for 'm' is allowed: a (over provider.max_price), b (price unknown).")
    assert caught.value.param == "provider"


def test_many_reasons_are_counted() -> None:
    with pytest.raises(NoAllowedRoute, match=r"r3 \(not in provider.only\) and 2 more"):
        made(*(candidate(f"r{i}") for i in range(6)), rules=Rules(only=frozenset({"x"})))


@pytest.mark.parametrize(
    "rules",
    [Rules(key_models=frozenset({"n"})), Rules(key_routes=frozenset({"x"})), Rules(key_cap=PriceCap(prompt=0))],
)
def test_what_the_key_does_not_allow_is_forbidden(rules: Rules) -> None:
    with pytest.raises(Forbidden, match="This key"):
        made(A, B, rules=rules)


def test_a_key_learns_nothing_of_models_and_routes_that_it_may_not_use() -> None:
    """Whether they exist or not, it is told the same."""
    rules = Rules(key_models=frozenset({"n"}))
    for there in ((), (A, B)):
        with pytest.raises(Forbidden) as caught:
            made(*there, rules=rules)
        assert caught.value.message == "This key may not use the model 'm'."
    with pytest.raises(NoAllowedRoute) as refused:
        made(A, B, rules=Rules(key_routes=frozenset({"a"}), ignore=frozenset({"a"})))
    assert refused.value.message == "No route for 'm' is allowed: a (in provider.ignore)."


def test_a_fallback_that_the_key_does_not_allow_is_left_out() -> None:
    found = made(asked=[asked("m", "a"), asked("n", "b")], rules=Rules(key_models=frozenset({"m"})))
    assert legs(found) == "a:m"
    assert told(found) == {"b": "its key may not use this model"}
