"""The rows of the ledger's tables: a field is a column, in the table's order. Times are UTC without a zone."""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct


class EventRow(Struct, frozen=True, gc=False):
    log: str
    position: int
    stream_seq: int
    id: str | None
    kind: str
    v: int | None
    ts: datetime | None
    org: str | None
    request_id: str | None
    epoch: int | None
    producer: str | None
    payload: str


class OpenRow(Struct, frozen=True, kw_only=True, gc=False):
    position: int
    request_id: str
    org: str | None
    key_id: str
    model: str
    stream: bool
    accepted_at: datetime
    prompt_hash: str
    ingress: str
    announced: bool


class EndRow(Struct, frozen=True, kw_only=True, gc=False):
    position: int
    request_id: str
    org: str | None
    key_id: str | None
    model: str | None
    route: str | None = None
    worker: str | None = None
    status: str
    http_status: int
    code: str | None
    stream: bool
    accepted_at: datetime
    finished_at: datetime
    queue_us: int | None = None
    first_token_us: int | None = None
    duration_us: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    audio_prompt_tokens: int = 0
    audio_completion_tokens: int = 0
    cost_pico: int = 0
    attempts: int = 0
    migrations: int = 0
    cached: bool = False
    finish_reason: str | None = None
    estimated: bool = False
    prompt_hash: str | None = None
    price_known: bool | None = None


class StartRow(Struct, frozen=True, kw_only=True, gc=False):
    position: int
    request_id: str
    epoch: int
    org: str | None
    started_at: datetime
    route: str
    worker: str
    queue_us: int


class LossRow(Struct, frozen=True, kw_only=True, gc=False):
    position: int
    request_id: str
    epoch: int
    org: str | None
    lost_at: datetime
    route: str
    worker: str | None
    code: str


class ReceiptRow(Struct, frozen=True, kw_only=True, gc=False):
    position: int
    request_id: str
    epoch: int
    org: str | None
    key_id: str
    finished_at: datetime
    route: str
    worker: str
    provider: str
    model: str
    upstream_model: str
    outcome: str
    code: str | None
    upstream_status: int | None
    upstream_id: str | None
    first_token_us: int | None
    duration_us: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    tokens_sent: int
    finish_reason: str | None


AnyRow = EventRow | OpenRow | EndRow | StartRow | LossRow | ReceiptRow

TABLES: dict[type[AnyRow], str] = {
    EventRow: "events",
    OpenRow: "facts.request_opens",
    EndRow: "facts.request_ends",
    StartRow: "facts.attempt_starts",
    LossRow: "facts.attempt_losses",
    ReceiptRow: "facts.attempt_receipts",
}
