"""What /admin/v1 takes and says. Times are Unix seconds here, as everywhere in the API."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from schemas.control import Role
from schemas.ids import KeyId, OrgId, RouteId, WorkerId
from schemas.jobs import EngineStats, TimeLimits
from schemas.money import PriceCap
from schemas.routing import MaxPrice, Name
from schemas.standing import Health, KeyStanding, Rates

DEFAULT_ORG = OrgId("default")
NAME_MAX_CHARS = 200
KEY_NAMES_MAX = 256  # of models or routes
GRACE_DEFAULT_S = 24 * 3600
GRACE_MAX_S = 30 * 24 * 3600


Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class KeyTimeouts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The time-outs of a key's requests, in seconds, and at most what they may ask for; null: nothing is said."""

    queue_s: Seconds | None = None
    first_token_s: Seconds | None = None
    idle_s: Seconds | None = None
    total_s: Seconds | None = None

    def stated(self) -> TimeLimits:
        return TimeLimits(**msgspec.structs.asdict(self))


KeyNames = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=KEY_NAMES_MAX)]


class TokenPrice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most that a key's requests may cost, in US dollars for a million tokens of the prompt and of the completion."""

    prompt: Decimal | None = None
    completion: Decimal | None = None

    def cap(self) -> PriceCap:
        """Raises: BadRequest."""
        return MaxPrice(prompt=self.prompt, completion=self.completion).cap(at="max_price")


class CreateKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /admin/v1/keys."""

    name: Annotated[str, Meta(max_length=NAME_MAX_CHARS)] = ""
    role: Role = Role.CLIENT
    org: OrgId = DEFAULT_ORG
    expires_in_s: Annotated[int, Meta(ge=1)] | None = None  # never, if not given
    timeouts: KeyTimeouts = KeyTimeouts()
    models: KeyNames | None = None  # that it may ask for; all, if not given
    routes: KeyNames | None = None  # that its requests may go to, by id or provider, or "own"; all, if not given
    max_price: TokenPrice | None = None


class RotateKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /admin/v1/keys/{key_id}/rotate. The old key works beside the new one for *grace_s* seconds."""

    grace_s: Annotated[int, Meta(ge=0, le=GRACE_MAX_S)] = GRACE_DEFAULT_S


class KeyPrice(Struct, frozen=True, kw_only=True):
    """As it was stated, exact decimals as strings."""

    prompt: str | None
    completion: str | None


class Key(Struct, frozen=True, kw_only=True):
    """A key as it may be shown: never itself, only its last characters."""

    id: KeyId
    object: Literal["key"] = "key"
    name: str
    role: Role
    org: OrgId
    hint: str
    created: int
    expires: int | None
    revoked: bool
    timeouts: TimeLimits
    models: tuple[str, ...] | None  # that it may ask for; null is all
    routes: tuple[str, ...] | None  # that its requests may go to; null is all
    max_price: KeyPrice | None


class NewKey(Key, frozen=True, kw_only=True):
    """A key just made or rotated. It is shown this once."""

    key: str


class KeyList(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[Key, ...]


class ServedRoute(Struct, frozen=True, kw_only=True):
    """A route at one of its workers, or without any."""

    route: RouteId
    provider: str
    models: tuple[str, ...]
    worker: WorkerId | None
    state: str
    slots: int
    free: int
    engine: EngineStats | None  # what the model server says of itself, where it does
    keys: tuple[KeyStanding, ...] = ()  # the provider's, never themselves
    rates: Rates | None = None  # where the route states limits
    health: Health | None = None
    left_alone: tuple[
        str, ...
    ] = ()  # models that cool down after a fault, as the ingress that was asked sees it, and why


class RouteList(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[ServedRoute, ...]
