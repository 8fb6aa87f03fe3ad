"""Which places a request will try, in which order, and why not the others: pure decisions.

Who may: the request's own `provider` and its key (`Rules`). In which order: strategies, then what is cooling down last.
Source: docs/adr/0060-routing.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_
from typing import Protocol

from ingress.policy.strategies import Candidate, Facts, Placed, arrange, means
from schemas.errors import Forbidden, ModelNotFound, NoAllowedRoute, NoLiveRoute, PenstockError
from schemas.ids import RouteId
from schemas.money import NO_CAP, Price, PriceCap
from schemas.routing import Block

LEGS_MAX = 16
LEFT_OUT_MAX = 16  # that are told
REASONS_SHOWN = 4  # in an error

BY_KEY = "its key may not use "  # how a reason begins that the client can do nothing about


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

    route: RouteId  # empty: the whole model
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


@dataclass(frozen=True, slots=True)
class Asked:
    """A model that a request names, and who serves it, in the operator's order. *why_away* is told where nobody does."""

    model: str
    candidates: tuple[Candidate, ...]
    away: tuple[Candidate, ...] = ()  # who served it, or would, and doesn't now
    why_away: str | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request and its key allow. Names are in lower case; None allows everything."""

    first: tuple[str, ...] = ()  # these, in this order, before all others
    only: frozenset[str] | None = None
    ignore: frozenset[str] = frozenset()
    fallbacks: bool = True
    cap: PriceCap = NO_CAP
    quantisations: frozenset[str] | None = None
    parameters: frozenset[str] = frozenset()  # that have to be known to be honoured
    key_models: frozenset[str] | None = None
    key_routes: frozenset[str] | None = None
    key_cap: PriceCap = NO_CAP

    def against(self, candidate: Candidate) -> str | None:
        """What speaks against *candidate*; None if nothing does."""
        if self is NO_RULES:
            return None
        return self.against_names(candidate) or self._against_price(candidate) or self._against_abilities(candidate)

    def against_names(self, candidate: Candidate) -> str | None:
        """The part that doesn't change with what is live."""
        if self.key_models is not None and candidate.model not in self.key_models:
            return f"{BY_KEY}this model"
        if self.key_routes is not None and not means(self.key_routes, candidate):
            return f"{BY_KEY}this route"
        if self.only is not None and not means(self.only, candidate):
            return "not in provider.only"
        if means(self.ignore, candidate):
            return "in provider.ignore"
        if not self.fallbacks and self.first and not means(frozenset(self.first), candidate):
            return "not in provider.order, and no fallbacks are allowed"
        return None

    def _against_price(self, candidate: Candidate) -> str | None:
        if not self.key_cap.allows(candidate.price):
            return f"{BY_KEY}{'a route of unknown price' if candidate.price.unknown else 'a route of this price'}"
        if not self.cap.allows(candidate.price):
            return "price unknown" if candidate.price.unknown else "over provider.max_price"
        return None

    def _against_abilities(self, candidate: Candidate) -> str | None:
        if self.quantisations is not None and not (
            candidate.quantisations and candidate.quantisations <= self.quantisations
        ):
            return f"quantization {' or '.join(sorted(candidate.quantisations)) or 'unknown'}"
        if self.parameters and candidate.parameters is None:
            return "not known which parameters it honours"
        if candidate.parameters is not None and (missing := self.parameters - candidate.parameters):
            return f"not known to honour {', '.join(sorted(missing)[:REASONS_SHOWN])}"
        return None


NO_RULES = Rules()


class Standings(Protocol):
    """Who is left alone after a fault."""

    def is_open(self, route: RouteId, model: str) -> bool: ...

    def why(self, route: RouteId, model: str) -> str:
        """Why it isn't simply up; empty if it is."""
        ...


def plan(
    asked: Sequence[Asked],
    rules: Rules,
    *,
    orders: Sequence[Sequence[str | Block]],
    facts: Facts,
    standings: Standings,
) -> Plan:
    """The plan for a request that names the models of *asked*, each to be put in order by its own of *orders*.

    With one order for several models, all their places are put in order together.
    Raises: NoLiveRoute, ModelNotFound, NoAllowedRoute, Forbidden.
    """
    allowed, left_out = _allowed(asked, rules)
    if len(orders) < len(asked):
        allowed = [[candidate for each in allowed for candidate in each]]
    placed: list[Placed] = []
    for candidates, order in zip(allowed, orders, strict=True):
        arranged = _named_first(arrange(candidates, order, facts), rules.first)
        arranged = _cooling_last(arranged, standings)
        if not rules.fallbacks and not rules.first:
            left_out += [LeftOut(c.route, c.model, "no fallbacks are allowed") for c, _ in arranged[1:]]
            del arranged[1:]
        placed += arranged
    if not placed:
        raise _nothing(asked, rules, left_out)
    placed = _cooling_last(placed, standings) if len(allowed) > 1 else placed
    left_out += [LeftOut(c.route, c.model, f"beyond the first {LEGS_MAX}") for c, _ in placed[LEGS_MAX:]]
    legs = tuple(
        Leg(c.route, c.model, c.price, _told(why, standings.why(c.route, c.model))) for c, why in placed[:LEGS_MAX]
    )
    return Plan(legs, tuple(left_out[:LEFT_OUT_MAX]))


def _allowed(asked: Sequence[Asked], rules: Rules) -> tuple[list[list[Candidate]], list[LeftOut]]:
    allowed: list[list[Candidate]] = []
    left_out: list[LeftOut] = []
    for each in asked:
        allowed.append([])
        if not each.candidates:
            why = "not served at the moment" if each.away or each.why_away else "no such model here"
            left_out.append(LeftOut(RouteId(""), each.model, why))
        for candidate in each.candidates:
            against = rules.against(candidate)
            if against is None:
                allowed[-1].append(candidate)
            else:
                left_out.append(LeftOut(candidate.route, candidate.model, against))
    return allowed, left_out


def _named_first(placed: list[Placed], first: Sequence[str]) -> list[Placed]:
    """Those that *first* names, in its order, before the others."""
    if not first:
        return placed
    places = {name: place for place, name in reversed(list(enumerate(first)))}

    def place(entry: Placed) -> int:
        candidate, _ = entry
        named = [places[name] for name in candidate.names if name in places]
        return min([*named, places.get("own", len(first)) if candidate.own else len(first)])

    return [(c, "in provider.order" if place((c, why)) < len(first) else why) for c, why in sorted(placed, key=place)]


def _cooling_last(placed: list[Placed], standings: Standings) -> list[Placed]:
    """A place that cools down, or is held, is a last resort: better than none, and worse than any other."""
    is_open = [standings.is_open(candidate.route, candidate.model) for candidate, _ in placed]
    if all(is_open):
        return placed
    return [*compress(placed, is_open), *compress(placed, map(not_, is_open))]


def _told(why: str, standing: str) -> str:
    return "; ".join(filter(None, (why, standing)))


def _nothing(asked: Sequence[Asked], rules: Rules, left_out: Sequence[LeftOut]) -> PenstockError:
    """Why there is no plan at all."""
    names = " and ".join(f"'{each.model}'" for each in asked)
    if rules.key_models is not None and rules.key_models.isdisjoint(each.model for each in asked):
        return Forbidden(f"This key may not use {_noun(asked)} {names}.", param="model")
    if any(rules.against_names(candidate) is None for each in asked for candidate in each.away):
        told = next((each.why_away.removesuffix(".") for each in asked if each.why_away), None)
        return NoLiveRoute(
            f"No worker serves {_noun(asked)} {names} at the moment{f': {told}' if told else ''}.", param="model"
        )
    refused = [entry for entry in left_out if entry.route]
    told_of = [entry for entry in refused if not entry.why.startswith(BY_KEY)]  # the others are none of its business
    if told_of:
        return NoAllowedRoute(
            f"No route for {names} is allowed: {_reasons(told_of)}.",
            param="provider",
            left_out=tuple((entry.route, entry.model, entry.why) for entry in left_out[:LEFT_OUT_MAX]),
        )
    if refused:
        return Forbidden(f"This key allows no route for {names}, or none at its price.", param="model")
    if any(each.why_away or each.away for each in asked):
        return NoLiveRoute(f"No worker serves {_noun(asked)} {names} at the moment.", param="model")
    exists = "does not exist here" if len(asked) == 1 else "do not exist here"
    return ModelNotFound(
        f"{_noun(asked).capitalize()} {names} {exists}. GET /v1/models lists those that do.", param="model"
    )


def _noun(asked: Sequence[Asked]) -> str:
    return "the model" if len(asked) == 1 else "the models"


def _reasons(left_out: Sequence[LeftOut]) -> str:
    told = [f"{entry.route} ({entry.why})" for entry in left_out[:REASONS_SHOWN]]
    more = len(left_out) - len(told)
    return ", ".join(told) + (f" and {more} more" if more > 0 else "")
