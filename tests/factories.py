"""Things as they usually are, so that a test names only what it is about."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from schemas.events import RequestRejected
from schemas.ids import EventId, IngressId, KeyId, Nonce, OrgId, RequestId, RouteId, new_id, new_nonce
from schemas.jobs import Job, Timeouts


def make_job(body: Mapping[str, Any] | bytes | None = None, **changes: Any) -> Job:
    """A job with *body*; it streams if the body says so. A mapping without messages gets one."""
    if not isinstance(body, bytes):
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello there"}], **(body or {})}
        changes.setdefault("stream", body.get("stream") is True)
        body = json.dumps(body).encode()
    usual = {
        "request_id": RequestId("0190b3a4-5c6d-7e8f-8a0b-1c2d3e4f5a6b"),
        "epoch": 1,
        "ingress": IngressId("ingress-1"),
        "nonce": Nonce("0" * 32),
        "org": OrgId("org"),
        "key_id": KeyId("key"),
        "model": "m",
        "route": RouteId("route"),
        "stream": False,
        "accepted_ns": 0,
        "timeouts": Timeouts(),
        "body": Raw(body),
    }
    return Job(**{**usual, **changes})


def new_job(body: Mapping[str, Any] | bytes | None = None, **changes: Any) -> Job:
    """A job that nobody has seen before."""
    return make_job(body, **{"request_id": RequestId(new_id()), "nonce": new_nonce(), **changes})


def make_event(**changes: Any) -> RequestRejected:
    """An event that nobody has seen before, of the smallest kind."""
    usual = {
        "id": EventId(new_id()),
        "ts_ns": time.time_ns(),
        "org": OrgId("org"),
        "request_id": RequestId(new_id()),
        "producer": "test",
        "code": "no_live_route",
        "http_status": 503,
    }
    return RequestRejected(**{**usual, **changes})
