"""Whatever is offered, asked for and measured: nobody is lost or doubled, and each strategy keeps its word."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ingress.policy.measured import Speed
from ingress.policy.routing import LEFT_OUT_MAX, LEGS_MAX, Asked, Rules, plan
from ingress.policy.strategies import Candidate, arrange, means
from schemas.errors import Forbidden, ModelNotFound, NoAllowedRoute, NoLiveRoute
from schemas.ids import RouteId
from schemas.money import NO_CAP, UNKNOWN, Price, PriceCap, cost
from schemas.routing import NESTED_MAX, STRATEGIES, Block
from tests.unit.ingress.test_routing import Standings
from tests.unit.ingress.test_strategies import Told

ROUTES = [f"r{i}" for i in range(8)]
micros = st.integers(0, 10**9)
prices = st.one_of(st.just(UNKNOWN), st.builds(Price, input=micros, output=micros))


def names(of: list[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(of), min_size=1, max_size=3).map(tuple)


candidates = st.lists(
    st.builds(
        lambda route, price, **facts: Candidate(RouteId(route), "m", price, names=frozenset({route, "p"}), **facts),
        st.sampled_from(ROUTES),
        prices,
        rank=st.integers(0, 3),
        own=st.booleans(),
        weight=st.integers(0, 5),
        tokens_per_minute=st.sampled_from([0, 1000]),
    ),
    unique_by=lambda c: c.route,
    max_size=8,
)
items: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(STRATEGIES),
    lambda inner: st.builds(
        lambda routes, strategy: Block(routes=routes, strategy=strategy),
        names([*ROUTES, "own"]),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=NESTED_MAX,
)
orders = st.lists(items, max_size=3).map(tuple)
facts = st.builds(
    lambda speeds, slots, used, seed: Told(
        speeds={route: Speed(first, pace) for route, (first, pace) in speeds.items()},
        slots={route: slots.get(route, (0, 1)) for route in ROUTES},
        used=used,
        dice=random.Random(seed).random,
    ),
    st.dictionaries(st.sampled_from(ROUTES), st.tuples(st.floats(1, 1e7), st.floats(1, 1e4))),
    st.dictionaries(st.sampled_from(ROUTES), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.dictionaries(st.sampled_from(ROUTES), st.integers(0, 10**6)),
    st.integers(),
)
sets = st.one_of(st.none(), names(ROUTES).map(frozenset))
caps = st.builds(PriceCap, prompt=st.one_of(st.none(), micros), completion=st.one_of(st.none(), micros))
rules = st.builds(
    Rules,
    first=st.one_of(st.just(()), names(ROUTES)),
    only=sets,
    ignore=sets.map(lambda found: found or frozenset()),
    fallbacks=st.booleans(),
    cap=st.one_of(st.just(NO_CAP), caps),
    key_routes=sets,
)
cooling = st.dictionaries(st.sampled_from(ROUTES), st.just("cooling"))


@given(candidates, orders, facts)
def test_every_order_is_a_permutation(found: list[Candidate], order: Any, told: Told) -> None:
    assert Counter(c.route for c, _ in arrange(found, order, told)) == Counter(c.route for c in found)


@given(candidates, orders, facts)
def test_the_first_of_nested_strategies_is_never_overruled(found: list[Candidate], order: Any, told: Told) -> None:
    placed = [c for c, _ in arrange(found, ("own_first", "cheapest", *order), told)]
    assert [c.own for c in placed] == sorted((c.own for c in found), reverse=True)
    for own in (True, False):
        known = [cost(told.usage, c.price) for c in placed if c.own is own and not c.price.unknown]
        assert known == sorted(known)
        unknown = [c.price.unknown for c in placed if c.own is own]
        assert unknown == sorted(unknown)


@given(candidates, facts)
def test_what_a_strategy_finds_alike_stays_in_the_operators_order(found: list[Candidate], told: Told) -> None:
    placed = [c for c, _ in arrange(found, ("own_first",), told)]
    for own in (True, False):
        assert [c for c in placed if c.own is own] == [c for c in found if c.own is own]


@given(st.integers())
def test_weighted_comes_first_in_proportion(seed: int) -> None:
    found = [Candidate(RouteId(str(weight)), "m", Price(), weight=weight) for weight in (1, 3, 0)]
    told = Told(dice=random.Random(seed).random)
    firsts = Counter(arrange(found, ("weighted",), told)[0][0].weight for _ in range(1000))
    assert firsts[0] == 0
    assert 650 < firsts[3] < 850  # 750 are expected; 100 are more than seven deviations


@given(candidates, rules, orders, facts, cooling)
def test_a_plan_has_whom_the_rules_allow_and_nobody_else(
    found: list[Candidate], rules: Rules, order: Any, told: Told, cooling: dict[str, str]
) -> None:
    allowed = {c.route for c in found if rules.against(c) is None}
    try:
        made = plan([Asked("m", tuple(found))], rules, orders=[order], facts=told, standings=Standings(**cooling))
    except (Forbidden, ModelNotFound, NoAllowedRoute, NoLiveRoute):
        assert not allowed
        return
    assert set(made.routes) <= allowed
    if rules.fallbacks or rules.first:
        assert set(made.routes) == allowed
    else:
        assert len(made.routes) == 1
    assert len(made.routes) == len(set(made.routes)) <= LEGS_MAX
    assert {*made.routes, *(entry.route for entry in made.left_out)} == {c.route for c in found}
    assert len(made.left_out) <= LEFT_OUT_MAX
    cool = [route in cooling for route in made.routes]
    assert cool == sorted(cool)


@given(candidates, names(ROUTES), facts)
def test_the_requests_own_order_comes_first(found: list[Candidate], first: tuple[str, ...], told: Told) -> None:
    if not found:
        return
    made = plan(
        [Asked("m", tuple(found))], Rules(first=first), orders=[("cheapest",)], facts=told, standings=Standings()
    )
    wanted = [route for route in dict.fromkeys(first) if any(means(frozenset({route}), c) for c in found)]
    assert list(made.routes[: len(wanted)]) == wanted
