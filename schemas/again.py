"""What ingresses say to each other when a client reads its answer on at another one than it began at."""

from __future__ import annotations

from msgspec import Struct

from schemas.ids import IngressId, KeyId, OrgId, RequestId


class Holder(Struct, frozen=True, kw_only=True):
    """Who serves the requests with some Idempotency-Key: the ingress that got the first one."""

    ingress: IngressId
    request_id: RequestId
    fingerprint: bytes  # of the body that the key was used for


class Ask(Struct, frozen=True, kw_only=True):
    """For what follows event *after* of what was told to the client with this key.

    *claimed*: because of an Idempotency-Key, which may be free by now; then there is nothing to be told.
    """

    request_id: RequestId
    org: OrgId
    key_id: KeyId
    after: int = 0
    claimed: bool = False


class Page(Struct, frozen=True, kw_only=True):
    """A piece of it. It is empty if nothing came for a while; *status* is 0 until the answer has begun."""

    ingress: IngressId  # who has it
    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    last: int = 0  # the last event in *body*
    ended: bool = False  # and nothing more will come
    over: bool = False  # the request is; some of its answer may still have to be fetched
    refused: str | None = None  # the code of an error instead
    message: str | None = None  # and its words
