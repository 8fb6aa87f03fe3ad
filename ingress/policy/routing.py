"""Which routes a request will try, in order, and what it costs there: a pure decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from schemas.control import RouteStated
from schemas.errors import ModelNotFound, NoLiveRoute
from schemas.ids import RouteId
from schemas.money import Price

UNRANKED = 1_000_000

WhyNot = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Leg:
    """A place where a request may be tried: a route, the model that is asked for there, and what it costs."""

    route: RouteId
    model: str  # the public name; another one than the client's where that named fallbacks
    price: Price
    why: str = ""  # it stands where it does, in a word or two


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A place that would serve the model, but not this request, and why not."""

    route: RouteId
    model: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The legs in the order in which they are tried, at least one; and what was left out."""

    legs: tuple[Leg, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def routes(self) -> tuple[RouteId, ...]:
        return tuple(leg.route for leg in self.legs)


def plan(
    model: str, *, offers: Mapping[RouteId, Price], stated: Mapping[RouteId, RouteStated], known: bool, why_not: WhyNot
) -> Plan:
    """The plan for *model*: its live routes (*offers*), by the rank the operator *stated*.

    *why_not* tells why its workers take no jobs, where one says so.
    A stated price counts before the one that a worker offers, unless it is unknown. *known* tells a model that is served at
    other times from one that never was.

    Raises: NoLiveRoute, ModelNotFound.
    """
    if not offers:
        if known or any(
            entry.name == model for route in stated.values() for entry in route.models if not route.removed
        ):
            reason = why_not(model)
            told = f": {reason}" if reason else ""
            raise NoLiveRoute(f"No worker serves the model '{model}' at the moment{told}.", param="model")
        raise ModelNotFound(
            f"The model '{model}' does not exist here. GET /v1/models lists those that do.", param="model"
        )
    routes = sorted(offers, key=lambda route: (_rank(stated.get(route)), route))
    return Plan(tuple(Leg(route, model, _price(stated.get(route), model) or offers[route]) for route in routes))


def _rank(stated: RouteStated | None) -> int:
    return UNRANKED if stated is None else stated.rank


def _price(stated: RouteStated | None, model: str) -> Price | None:
    if stated is None or stated.removed:
        return None
    return next((entry.price for entry in stated.models if entry.name == model and not entry.price.unknown), None)
