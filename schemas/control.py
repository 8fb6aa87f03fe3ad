"""Facts about the deployment itself, as its operator states them, and their fold.

CONTROL is event-sourced: one subject for each entity, the last message on it is its state. `ControlState.apply` folds
them; every ingress and the ledger keep such a fold in memory, so that a change reaches all of them in milliseconds.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import Struct

from schemas.ids import EventId, KeyId, OrgId, RouteId
from schemas.jobs import TimeLimits
from schemas.money import NO_CAP, Price, PriceCap


class Role(StrEnum):
    """What a key may do: a client uses the API, an analyst reads the ledger too, an admin may do everything."""

    CLIENT = "client"
    ANALYST = "analyst"
    ADMIN = "admin"


class ControlEvent(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """The envelope. Every event carries the entity's whole state, so that the last one on a subject is enough."""

    id: EventId
    v: int = 1
    ts_ns: int
    by: str  # the key id, or the setup that stated it
    producer: str


class OrgStated(ControlEvent, frozen=True, kw_only=True, tag="control.org.stated"):
    org: OrgId
    name: str


class KeyStated(ControlEvent, frozen=True, kw_only=True, tag="control.key.stated"):
    """A key was created, rotated or revoked. The key itself is nowhere: only its SHA-256, and its last four characters."""

    key_id: KeyId
    org: OrgId
    role: Role
    name: str = ""
    hash: str  # SHA-256 in hex
    hint: str = ""  # the last four characters, for people
    created_ns: int
    expires_ns: int | None = None
    revoked: bool = False
    previous_hash: str | None = None  # valid until previous_until_ns after a rotation
    previous_until_ns: int | None = None
    timeouts: TimeLimits = TimeLimits()
    models: tuple[str, ...] | None = None  # that it may ask for; None: all
    routes: tuple[str, ...] | None = None  # that its requests may go to, by id or provider; None: all
    max_price: PriceCap = NO_CAP


class PublicModel(Struct, frozen=True, kw_only=True):
    name: str
    price: Price = Price()


class RouteStated(ControlEvent, frozen=True, kw_only=True, tag="control.route.stated"):
    """A route, the public names of its models and their prices. Addresses and keys of providers stay with the workers."""

    route: RouteId
    provider: str
    models: tuple[PublicModel, ...]
    rank: int = 0  # routes of a lower rank are tried first
    weight: int = 1  # its part of what the strategy `weighted` spreads
    tokens_per_minute: int = 0  # what its account may use; 0: not known
    created_ns: int = 0
    removed: bool = False
    timeouts: TimeLimits = TimeLimits()


AnyControlEvent = OrgStated | KeyStated | RouteStated

decode_control = msgspec.json.Decoder(AnyControlEvent).decode


class ControlState:
    """The fold of CONTROL: last value per entity."""

    def __init__(self) -> None:
        self.orgs: dict[OrgId, OrgStated] = {}
        self.keys: dict[KeyId, KeyStated] = {}
        self.routes: dict[RouteId, RouteStated] = {}
        self._by_hash: dict[str, KeyId] = {}

    def apply(self, event: AnyControlEvent) -> None:
        match event:
            case OrgStated():
                self.orgs[event.org] = event
            case KeyStated():
                self._forget(self.keys.get(event.key_id))
                self.keys[event.key_id] = event
                self._by_hash[event.hash] = event.key_id
                if event.previous_hash:
                    self._by_hash[event.previous_hash] = event.key_id
            case RouteStated():
                self.routes[event.route] = event

    def key_of(self, hash_: str, *, now_ns: int) -> KeyStated | None:
        """The key with this hash if it may be used at *now_ns* (UTC); None otherwise."""
        key_id = self._by_hash.get(hash_)
        key = None if key_id is None else self.keys[key_id]
        if key is None or key.revoked or (key.expires_ns is not None and now_ns >= key.expires_ns):
            return None
        if hash_ != key.hash and now_ns >= (key.previous_until_ns or 0):
            return None
        return key

    def _forget(self, old: KeyStated | None) -> None:
        if old is not None:
            self._by_hash.pop(old.hash, None)
            if old.previous_hash:
                self._by_hash.pop(old.previous_hash, None)
