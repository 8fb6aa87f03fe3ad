"""Where requests go: what the fleet offers, the operator states and this ingress has seen itself, made into plans.

Everything is in memory, and what is the same for all requests is kept until an offer or a statement changes: the plan for
a model with one route is a look-up.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from bus.control import ControlFeed
from ingress.continuing import Continuing
from ingress.delivered import Delivered
from ingress.fleet import Fleet, Offer
from ingress.moment import Moment
from ingress.policy.routing import NO_RULES, Asked, Leg, Plan, Rules, plan
from ingress.policy.strategies import OWN, UNRANKED, Candidate
from ingress.policy.waits import NOT_SAID
from ingress.trip import Seen, Trip
from schemas.chat import ChatRequest, parameters_of
from schemas.control import AnyControlEvent, KeyStated, RouteStated
from schemas.errors import BadRequest
from schemas.ids import RouteId, WorkerId
from schemas.jobs import TimeLimits
from schemas.money import NO_CAP, Price
from schemas.providers import known_providers
from schemas.routing import SORTS, Block, Preferences, items_of
from schemas.settings import OWN as OWN_PROVIDERS
from schemas.settings import RoutingSettings

NAMES_SHOWN = 20

_NO_WISHES = Preferences()


@dataclass(frozen=True, slots=True)
class _Served:
    """A model as it is served now: *plan* is there where nothing has to be decided."""

    candidates: tuple[Candidate, ...] = ()  # in the operator's order
    plan: Plan | None = None


class Router:
    """Makes the plans. *clock* counts monotonic seconds; *dice* throws a number from 0 up to 1."""

    def __init__(
        self,
        fleet: Fleet,
        control: ControlFeed,
        settings: RoutingSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._fleet = fleet
        self._stated = control.state.routes
        self._clock = clock
        self._dice = dice
        self._seen = Seen(settings, fleet.load, clock=clock)
        self._order = items_of(settings.strategy)
        self._orders = {model: items_of(order) for model, order in settings.models.items()}
        self._served: dict[str, _Served] = {}  # by model; of live ones only
        self._names: frozenset[str] = frozenset()  # of routes and providers, in lower case
        self._version = -1  # of the fleet, when these were made
        control.on_change(self._on_change)

    def plan(self, request: ChatRequest, key: KeyStated, body: bytes) -> Plan:
        """Raises: NoLiveRoute, ModelNotFound, NoAllowedRoute, Forbidden, BadRequest."""
        served = self._served_now(request.model)
        wishes = request.provider or _NO_WISHES
        plain = request.provider is None and request.models is None and _is_free(key)
        if plain and served.plan is not None:
            return served.plan
        models = tuple(dict.fromkeys((request.model, *(request.models or ()))))
        moment = Moment(self._seen, request, dice=self._dice)
        return plan(
            [self._asked(model, plain=plain) for model in models],
            NO_RULES if plain else self._rules(wishes, key, body),
            orders=self._orders_of(models, wishes),
            facts=moment,
            standings=moment,
        )

    def begin(self, leg: Leg, *, stream: bool) -> Trip:
        """An attempt at *leg* begins now. Whoever makes a trip ends it."""
        return Trip(self._seen, leg, stream=stream)

    def is_up(self, leg: Leg) -> bool:
        """Whether an attempt may begin at *leg*: not while it cools down, another one probes it, or its limits are used up."""
        return self._seen.is_open(leg.route, leg.model, now=self._clock())

    def left_alone(self, route: RouteId, models: Sequence[str]) -> list[str]:
        """Which *models* of *route* are, each with the reason."""
        now = self._clock()
        told = ((model, self._seen.cooldowns.why(route, model, now=now)) for model in models)
        return [f"{model}: {why}" for model, why in told if why]

    def servers(self, leg: Leg) -> AbstractSet[WorkerId]:
        """The workers that serve *leg* now."""
        return self._fleet.servers(leg.route, leg.model)

    def timeouts(self, leg: Leg) -> TimeLimits:
        """What the operator states for *leg*'s route."""
        stated = self._stated.get(leg.route)
        return NOT_SAID if stated is None else stated.timeouts

    def continuing(self, request: ChatRequest, body: bytes, plan: Plan) -> Continuing:
        """For an answer of *plan* that may break off."""
        return Continuing(Delivered(request, body), plan.legs, fleet=self._fleet, clock=self._clock)

    def p95_ttft_us(self, leg: Leg, *, stream: bool) -> int | None:
        """How long 95 of 100 first chunks take to come from *leg* at most; None while too few have come.

        Without streaming the first chunk is the whole answer.
        """
        return self._seen.measured.p95_ttft(leg.route, leg.model, stream=stream, now=self._clock())

    def _rules(self, wishes: Preferences, key: KeyStated, body: bytes) -> Rules:
        """Raises: BadRequest."""
        return Rules(
            first=self._checked(wishes.order, "order", key) or (),
            only=_set(self._checked(wishes.only, "only", key)),
            ignore=frozenset(self._checked(wishes.ignore, "ignore", key) or ()),
            fallbacks=wishes.allow_fallbacks is not False,
            cap=NO_CAP if wishes.max_price is None else wishes.max_price.cap(),
            quantisations=_set(_lower(wishes.quantizations)),
            parameters=parameters_of(body) if wishes.require_parameters else frozenset(),
            key_models=_set(key.models),
            key_routes=_set(_lower(key.routes)),
            key_cap=key.max_price,
        )

    def _checked(self, names: tuple[str, ...] | None, member: str, key: KeyStated) -> tuple[str, ...] | None:
        """*names* in lower case. Raises: BadRequest if one of them means nothing here."""
        lower = _lower(names)
        for i, name in enumerate(lower or ()):
            if name not in self._names:
                param = f"provider.{member}[{i}]"
                raise BadRequest(
                    f"Invalid value for '{param}': there is no route and no provider of this name. "
                    f"There are: {self._shown_to(key)}.",
                    param=param,
                )
        return lower

    def _shown_to(self, key: KeyStated) -> str:
        """The names that *key* may know of, as many as fit into a sentence."""
        its_own = _set(_lower(key.routes))
        names = sorted(name for name in self._here() if its_own is None or name.lower() in its_own)
        return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")

    def _orders_of(self, models: tuple[str, ...], wishes: Preferences) -> list[tuple[str | Block, ...]]:
        if wishes.sort_by is not None:
            orders: list[tuple[str | Block, ...]] = [(SORTS[wishes.sort_by],) for _ in models]
        else:
            orders = [self._orders.get(model, self._order) for model in models]
        return orders[:1] if wishes.across_models else orders

    def _asked(self, model: str, *, plain: bool) -> Asked:
        candidates = self._served_now(model).candidates
        if plain and candidates:
            return Asked(model, candidates)
        live = self._fleet.offers(model)
        gone = {route: self._candidate(route, model, offer) for route, offer in self._fleet.away(model).items()}
        for stated in self._stated.values():
            if stated.route not in live and not stated.removed and any(m.name == model for m in stated.models):
                gone.setdefault(stated.route, _stated_candidate(stated, model))
        return Asked(model, candidates, tuple(gone.values()), None if candidates else self._fleet.why_not(model))

    def _served_now(self, model: str) -> _Served:
        if self._version != self._fleet.version:
            self._forget()
        served = self._served.get(model)
        if served is None:
            served = self._look_up(model)
            if served.candidates:
                self._served[model] = served
        return served

    def _look_up(self, model: str) -> _Served:
        found = [self._candidate(route, model, offer) for route, offer in self._fleet.offers(model).items()]
        found.sort(key=lambda candidate: (candidate.rank, candidate.route))
        alone = Plan((Leg(found[0].route, model, found[0].price),)) if len(found) == 1 else None
        return _Served(tuple(found), alone)

    def _candidate(self, route: RouteId, model: str, offer: Offer) -> Candidate:
        stated = self._stated.get(route)
        return Candidate(
            route,
            model,
            _price(stated, model) or offer.price,
            rank=UNRANKED if stated is None else stated.rank,
            own=offer.provider in OWN_PROVIDERS if offer.own is None else offer.own,
            names=frozenset({route.lower(), offer.provider.lower()}),
            weight=1 if stated is None else stated.weight,
            tokens_per_minute=0 if stated is None else stated.tokens_per_minute,
            quantisations=offer.quantisations,
            parameters=offer.parameters,
        )

    def _on_change(self, event: AnyControlEvent) -> None:
        if isinstance(event, RouteStated):
            self._version = -1

    def _forget(self) -> None:
        self._served.clear()
        self._version = self._fleet.version
        names = {*self._here(), *known_providers(), *OWN_PROVIDERS, OWN}
        self._names = frozenset(name.lower() for name in names)

    def _here(self) -> set[str]:
        """The names of the routes that there are or were, and of their providers."""
        stated = [name for route in self._stated.values() for name in (route.route, route.provider)]
        return self._fleet.names() | set(stated)


def _is_free(key: KeyStated) -> bool:
    """Whether *key* restricts nothing."""
    return key.models is None and key.routes is None and key.max_price == NO_CAP


def _price(stated: RouteStated | None, model: str) -> Price | None:
    """What the operator states comes before what a worker offers, unless it is unknown."""
    if stated is None or stated.removed:
        return None
    return next((entry.price for entry in stated.models if entry.name == model and not entry.price.unknown), None)


def _stated_candidate(stated: RouteStated, model: str) -> Candidate:
    """A route that nobody serves now."""
    return Candidate(stated.route, model, Price(), names=frozenset({stated.route.lower(), stated.provider.lower()}))


def _lower(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(name.lower() for name in names)


def _set(names: tuple[str, ...] | None) -> frozenset[str] | None:
    return None if names is None else frozenset(names)
