"""Which routes a request will try, in which order, at which price."""

from __future__ import annotations

from typing import Any

import pytest

from ingress.policy.routing import Plan, plan
from schemas.control import PublicModel, RouteStated
from schemas.errors import ModelNotFound, NoLiveRoute
from schemas.ids import EventId, RouteId
from schemas.money import UNKNOWN, Price

A, B, C = RouteId("a"), RouteId("b"), RouteId("c")
OFFERED, STATED = Price(input=1, output=1), Price(input=2, output=2)


def _stated(route: RouteId, *, rank: int = 0, **changes: Any) -> RouteStated:
    models = (PublicModel(name="m", price=STATED),)
    return RouteStated(
        **{
            "id": EventId("e"),
            "ts_ns": 0,
            "by": "test",
            "producer": "test",
            "route": route,
            "provider": "p",
            "models": models,
            "rank": rank,
            **changes,
        }
    )


def _plan(offers: dict[RouteId, Price], *stated: RouteStated, known: bool = False, why: str | None = None) -> Plan:
    return plan("m", offers=offers, stated={s.route: s for s in stated}, known=known, why_not=lambda _: why)


def _prices(made: Plan) -> tuple[Price, ...]:
    return tuple(leg.price for leg in made.legs)


def test_routes_are_tried_by_rank_then_by_name() -> None:
    offers = {C: OFFERED, B: OFFERED, A: OFFERED}
    assert _plan(offers).routes == (A, B, C)
    assert _plan(offers, _stated(C, rank=0), _stated(B, rank=1), _stated(A, rank=1)).routes == (C, A, B)


def test_a_route_that_nobody_ranked_comes_last() -> None:
    assert _plan({A: OFFERED, B: OFFERED}, _stated(B, rank=99)).routes == (B, A)


def test_the_operators_price_counts_before_the_workers() -> None:
    assert _prices(_plan({A: OFFERED, B: OFFERED}, _stated(A))) == (STATED, OFFERED)
    assert _prices(_plan({A: OFFERED}, _stated(A, removed=True))) == (OFFERED,)
    assert _prices(_plan({A: OFFERED}, _stated(A, models=()))) == (OFFERED,)


@pytest.mark.parametrize(("known", "stated"), [(True, ()), (False, (_stated(A),))])
def test_a_model_that_was_served_or_is_stated_is_only_away(known: bool, stated: tuple[RouteStated, ...]) -> None:
    with pytest.raises(NoLiveRoute) as caught:
        _plan({}, *stated, known=known)
    assert caught.value.param == "model"


def test_why_it_is_away_is_told() -> None:
    with pytest.raises(NoLiveRoute, match="the engine is loading"):
        _plan({}, known=True, why="the engine is loading")


@pytest.mark.parametrize("stated", [(), (_stated(A, removed=True),), (_stated(A, models=()),)])
def test_a_model_that_never_was_is_not_found(stated: tuple[RouteStated, ...]) -> None:
    with pytest.raises(ModelNotFound) as caught:
        _plan({}, *stated)
    assert caught.value.param == "model"


def test_a_stated_price_that_is_unknown_gives_way_to_the_workers() -> None:
    stated = _stated(A, models=(PublicModel(name="m", price=UNKNOWN),))
    assert _prices(_plan({A: OFFERED}, stated)) == (OFFERED,)
    assert _prices(_plan({A: UNKNOWN}, stated)) == (UNKNOWN,)
