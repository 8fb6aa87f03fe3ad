"""Events as they usually are, so that a test names only what it is about."""

from __future__ import annotations

from itertools import count
from typing import Any

from schemas.codec import encode
from schemas.control import KeyStated, OrgStated, PublicModel, Role, RouteStated
from schemas.events import (
    AttemptFinished,
    AttemptLost,
    AttemptStarted,
    Event,
    RequestAccepted,
    RequestFinished,
    RequestRejected,
    RequestReplayed,
    StreamMigrated,
)
from schemas.money import Price, Usage, cost

NOON_NS = 1_795_176_000_000_000_000  # 2026-11-20 12:00:00 UTC
MS_NS = 1_000_000
PRICE = Price(input=150_000, output=600_000, cached_input=75_000)
USAGE = Usage(prompt_tokens=20, completion_tokens=10, cached_tokens=4)
PROMPT_HASH = "ab" * 32

_numbers = count(1)


def uuid(number: int, *, of: int = 0) -> str:
    """A UUIDv7 that is later the greater *number* is; *of* tells kinds of things apart."""
    stamp = f"{0x019A_0000_0000 + number:012x}"
    return f"{stamp[:8]}-{stamp[8:]}-7{of:03x}-8000-{number:012x}"


def event_id() -> str:
    return uuid(next(_numbers), of=1)


def accepted(request: int = 1, **changes: Any) -> RequestAccepted:
    return RequestAccepted(
        **{
            **_envelope(request, 0),
            "key_id": "key_1",
            "model": "m",
            "plan": ("r1", "r2"),
            "stream": True,
            "prompt_hash": PROMPT_HASH,
            "body_bytes": 90,
            "price": PRICE,
            **changes,
        }
    )


def rejected(request: int = 1, **changes: Any) -> RequestRejected:
    usual = {"key_id": "key_1", "model": "m", "code": "backlog_full", "http_status": 429}
    return RequestRejected(**{**_envelope(request, 1), **usual, **changes})


def replayed(request: int = 1, **changes: Any) -> RequestReplayed:
    usual = {"key_id": "key_1", "by": "idempotency_key", "running": False}
    return RequestReplayed(**{**_envelope(request, 60), **usual, **changes})


def started(request: int = 1, **changes: Any) -> AttemptStarted:
    usual = {"epoch": 1, "route": "r1", "worker": "worker-1", "queue_us": 2_000}
    return AttemptStarted(**{**_envelope(request, 2), **usual, **changes})


def lost(request: int = 1, **changes: Any) -> AttemptLost:
    usual = {"epoch": 1, "route": "r1", "worker": "worker-1", "code": "worker_lost"}
    return AttemptLost(**{**_envelope(request, 30), **usual, **changes})


def migrated(request: int = 1, **changes: Any) -> StreamMigrated:
    usual = {"epoch": 2, "route": "r2", "worker": "worker-2", "from_route": "r1", "from_worker": "worker-1"}
    told = {"reason": "worker_lost", "how": "exact", "tokens_carried": 7, "gap_us": 85_000}
    return StreamMigrated(**{**_envelope(request, 31), **usual, **told, **changes})


def receipt(request: int = 1, **changes: Any) -> AttemptFinished:
    return AttemptFinished(
        **{
            **_envelope(request, 42),
            "producer": "worker-1",
            "epoch": 1,
            "key_id": "key_1",
            "route": "r1",
            "worker": "worker-1",
            "provider": "openai",
            "model": "m",
            "upstream_model": "theirs",
            "outcome": "completed",
            "upstream_status": 200,
            "upstream_id": "chatcmpl-theirs",
            "usage": USAGE,
            "tokens_sent": 10,
            "first_token_us": 5_000,
            "duration_us": 40_000,
            "finish_reason": "stop",
            **changes,
        }
    )


def finished(request: int = 1, **changes: Any) -> RequestFinished:
    usage = changes.get("usage", USAGE)
    return RequestFinished(
        **{
            **_envelope(request, 45),
            "epoch": 1,
            "key_id": "key_1",
            "model": "m",
            "route": "r1",
            "worker": "worker-1",
            "status": "completed",
            "http_status": 200,
            "stream": True,
            "accepted_ns": _at(request, 0),
            "queue_us": 2_000,
            "first_token_us": 7_500,
            "duration_us": 45_000,
            "usage": usage,
            "price": PRICE,
            "cost_pico": cost(usage, PRICE),
            "finish_reason": "stop",
            "prompt_hash": PROMPT_HASH,
            **changes,
        }
    )


def whole(request: int = 1) -> list[Event]:
    """The events of a request that went well."""
    return [accepted(request), started(request), receipt(request), finished(request)]


def key_stated(hash_: str = "00" * 32, **changes: Any) -> KeyStated:
    usual = {"key_id": "key_1", "org": "acme", "role": Role.ANALYST, "name": "mine", "created_ns": NOON_NS}
    return KeyStated(**{**_statement(), **usual, "hash": hash_, **changes})


def org_stated(**changes: Any) -> OrgStated:
    return OrgStated(**{**_statement(), "org": "acme", "name": "Acme", **changes})


def route_stated(**changes: Any) -> RouteStated:
    usual = {"route": "r1", "provider": "openai", "models": (PublicModel(name="m", price=PRICE),)}
    return RouteStated(**{**_statement(), **usual, **changes})


def page(*events: Event | bytes) -> bytes:
    """A message of EVENTS; bytes stand for themselves."""
    return b"\n".join(event if isinstance(event, bytes) else encode(event) for event in events)


def _envelope(request: int, after_ms: int) -> dict[str, Any]:
    return {
        "id": event_id(),
        "ts_ns": _at(request, after_ms),
        "org": "acme",
        "request_id": uuid(request),
        "producer": "ingress-1",
    }


def _statement() -> dict[str, Any]:
    return {"id": event_id(), "ts_ns": NOON_NS, "by": "setup", "producer": "ingress-1"}


def _at(request: int, after_ms: int) -> int:
    return NOON_NS + (request * 100 + after_ms) * MS_NS
