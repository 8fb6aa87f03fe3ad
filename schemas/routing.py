"""Where requests go, as people say it: strategies in the settings, `provider` and `models` in a request's body.

The members of a body have OpenRouter's shape. What is written here is meant for this service and goes no further, so a
member that it doesn't know is refused: the promise behind it could not be kept.
Source: docs/adr/0060-routing.md
"""

from __future__ import annotations

from decimal import ROUND_FLOOR, Decimal
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

from schemas.errors import BadRequest
from schemas.money import MICRO_PER_DOLLAR, PriceCap

NAMES_MAX = 64  # of routes in a list
MODELS_MAX = 16  # that a request may name beside its own
NAME_MAX_CHARS = 256
DOLLARS_MAX = 10**12

StrategyName = Literal[
    "ordered", "own_first", "cheapest", "fastest", "latency", "throughput", "least_busy", "weighted", "usage_based"
]
STRATEGIES: tuple[str, ...] = get_args(StrategyName)

SORTS = {"price": "cheapest", "throughput": "throughput", "latency": "latency"}  # OpenRouter's words for three of them

Name = Annotated[str, Meta(min_length=1, max_length=NAME_MAX_CHARS)]
Names = Annotated[tuple[Name, ...], Meta(max_length=NAMES_MAX)]
Models = Annotated[tuple[Name, ...], Meta(max_length=MODELS_MAX)]


class Block(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of a strategy: these *routes* first, by a *strategy* of their own; what comes after it is for the others."""

    routes: tuple[str, ...]  # ids, names of providers, or "own"
    strategy: Order = "ordered"


Order = str | tuple[str | Block, ...]


class MaxPrice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """US dollars: for a million tokens of the prompt, a million of the completion, one request, one image."""

    prompt: Decimal | None = None
    completion: Decimal | None = None
    request: Decimal | None = None
    image: Decimal | None = None

    def cap(self, *, at: str = "provider.max_price") -> PriceCap:
        """As whole micro-dollars per million tokens. Nothing here is priced by the request or the image.

        Raises: BadRequest.
        """
        for name in ("request", "image"):
            _micro(getattr(self, name), f"{at}.{name}")
        return PriceCap(
            prompt=_micro(self.prompt, f"{at}.prompt"), completion=_micro(self.completion, f"{at}.completion")
        )


class Sort(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    by: str | None = None  # one of `SORTS`
    partition: str | None = None  # model: a model's routes before those of the next; none: all models together


class Preferences(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request's own ``provider``. Names are routes' ids or their providers'."""

    order: Names | None = None
    only: Names | None = None
    ignore: Names | None = None
    allow_fallbacks: bool | None = None
    require_parameters: bool | None = None
    quantizations: Names | None = None
    sort: str | Sort | None = None
    max_price: MaxPrice | None = None
    data_collection: str | None = None  # allow: as it is anyway
    zdr: bool | None = None
    enforce_distillable_text: bool | None = None
    preferred_min_throughput: float | dict[str, float] | None = None  # a wish, not a promise: not looked at
    preferred_max_latency: float | dict[str, float] | None = None

    @property
    def sort_by(self) -> str | None:
        return self.sort.by if isinstance(self.sort, Sort) else self.sort

    @property
    def across_models(self) -> bool:
        return isinstance(self.sort, Sort) and self.sort.partition == "none"

    def check(self) -> None:
        """What types can't say. Raises: BadRequest that names the member."""
        _refuse_unkept(self)
        if self.sort_by is not None and self.sort_by not in SORTS:
            _refuse("sort", f"'{self.sort_by}' is none of {', '.join(SORTS)}")
        if isinstance(self.sort, Sort) and self.sort.partition not in (None, "model", "none"):
            _refuse("sort.partition", f"'{self.sort.partition}' is neither model nor none")
        for name in ("only", "quantizations"):
            if getattr(self, name) == ():
                _refuse(name, "it is empty, which allows nothing; leave it out to allow everything")
        if self.only is not None and set(self.only) <= set(self.ignore or ()):
            _refuse("only", "everything that it allows is in 'ignore'")


def _refuse_unkept(wishes: Preferences) -> None:
    """What OpenRouter promises and this service doesn't know enough to. Raises: BadRequest."""
    kept = "name the routes that you trust in 'provider.only'"
    if wishes.data_collection not in (None, "allow"):
        _refuse("data_collection", f"what providers keep isn't known here, so only 'allow' can be honoured; {kept}")
    if wishes.zdr:
        _refuse("zdr", f"what providers keep isn't known here, so it can't be honoured; {kept}")
    if wishes.enforce_distillable_text:
        _refuse("enforce_distillable_text", "the terms of models aren't known here, so it can't be honoured")


def _micro(dollars: Decimal | None, param: str) -> int | None:
    """Rounded down: a price is a whole number of them, so nothing between two can make a difference."""
    if dollars is None:
        return None
    if not dollars.is_finite() or not 0 <= dollars <= DOLLARS_MAX:
        raise BadRequest(f"Invalid value for '{param}': expected US dollars, zero or more.", param=param)
    return int((dollars * MICRO_PER_DOLLAR).to_integral_value(ROUND_FLOOR))


def _refuse(member: str, why: str) -> None:
    param = f"provider.{member}"
    raise BadRequest(f"Invalid value for '{param}': {why}.", param=param)


def items_of(order: Order) -> tuple[str | Block, ...]:
    """*order* as a list: a string is one, with commas."""
    if isinstance(order, str):
        return tuple(name.strip() for name in order.split(",") if name.strip())
    return order


def check_order(order: Order, *, depth: int = 0) -> None:
    """Raises: ValueError that names the strategy which there isn't."""
    if depth > NESTED_MAX:
        raise ValueError(f"strategies are nested more than {NESTED_MAX} deep")
    items = items_of(order)
    if not items:
        raise ValueError(f"a strategy names at least one of {', '.join(STRATEGIES)}")
    for item in items:
        if isinstance(item, Block):
            if not item.routes:
                raise ValueError("a part of a strategy names at least one route")
            check_order(item.strategy, depth=depth + 1)
        elif item not in STRATEGIES:
            raise ValueError(f"{item!r} is no strategy; there are {', '.join(STRATEGIES)}")


NESTED_MAX = 4
