"""What /admin/v1 takes and says. Times are Unix seconds here, as everywhere in the API."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from schemas.control import KeyStated, Role
from schemas.ids import KeyId, OrgId

DEFAULT_ORG = OrgId("default")

Seconds = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(max_length=200)]


class NewKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /admin/v1/keys."""

    org: Annotated[OrgId, Meta(min_length=1, max_length=60)] = DEFAULT_ORG
    role: Role = Role.CLIENT
    name: Name = ""
    expires_in_s: Annotated[int, Meta(ge=1)] | None = None  # never, if not given


class Rotation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /admin/v1/keys/{id}/rotate."""

    grace_s: Seconds = 0  # how long the old key is still good


class Key(Struct, frozen=True, kw_only=True):
    """A key as it may be shown: by its last characters only."""

    id: KeyId
    object: Literal["key"] = "key"
    org: OrgId
    role: Role
    name: str
    hint: str
    created_at: int
    expires_at: int | None = None
    revoked: bool = False


class KeyWithSecret(Key, frozen=True, kw_only=True):
    """A key just made. This is the only time that it is shown."""

    key: str


class KeyList(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[Key, ...]


def key_of(stated: KeyStated) -> Key:
    return Key(
        id=stated.key_id,
        org=stated.org,
        role=stated.role,
        name=stated.name,
        hint=stated.hint,
        created_at=stated.created_ns // 1_000_000_000,
        expires_at=None if stated.expires_ns is None else stated.expires_ns // 1_000_000_000,
        revoked=stated.revoked,
    )
