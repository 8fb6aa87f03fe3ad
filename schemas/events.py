"""Facts about requests: what is written to EVENTS and never changed again.

The rules of change: a field is never renamed or reused; a new field has a default; anything else is a new version of the
kind, with a pure step in schemas/upcasters.py from the version before. ``tests/golden`` holds every version ever written.
Prompts and answers are never in an event: hashes and counts only.
"""

from __future__ import annotations

from msgspec import Struct

from schemas.ids import EventId, KeyId, OrgId, RequestId, RouteId, WorkerId
from schemas.money import Price, Usage

INGRESS_LOST = "ingress_lost"  # the code of what ended because the ingress that served it died
# The codes of attempts that the ingress gave up because another one counts: of what they gave nobody was told anything.
BEGUN_ELSEWHERE = "begun_elsewhere"  # another worker had begun the same job before
HEDGE_LOST = "hedge_lost"  # another attempt was faster


class Event(Struct, frozen=True, kw_only=True, tag_field="kind"):
    """The envelope. ``ts_ns`` is UTC nanoseconds since 1970; ``epoch`` is 0 where no attempt is meant."""

    id: EventId
    v: int = 1
    ts_ns: int
    org: OrgId | None
    request_id: RequestId
    epoch: int = 0
    producer: str


class LeftOutLeg(Struct, frozen=True, kw_only=True):
    """A place that the request could have gone to, and why it will not."""

    route: RouteId
    model: str
    why: str


class RequestAccepted(Event, frozen=True, kw_only=True, tag="request.accepted"):
    """The request is valid, its key may make it and a route is live. Durable before the job's first byte reaches the client."""

    key_id: KeyId
    model: str
    plan: tuple[RouteId, ...]  # the routes in the order in which they will be tried
    stream: bool
    prompt_hash: str  # SHA-256 in hex over the org and the messages as sent
    body_bytes: int
    price: Price  # of the plan's first route, fixed at admission
    hold_pico: int = 0
    announced: bool = False  # its ingress says that it is there, and stops at a fence; those of earlier releases don't
    prompt_bytes: int = 0  # of the messages: what an estimate of the prompt's tokens is made of
    models: tuple[str, ...] = ()  # of each route of the plan, where one differs from the client's
    prices: tuple[Price, ...] = ()  # of each route of the plan, where one differs from the first's
    reasons: tuple[str, ...] = ()  # of each route of the plan, where there was a choice: why it stands there
    left_out: tuple[LeftOutLeg, ...] = ()  # the first of them


class RequestRejected(Event, frozen=True, kw_only=True, tag="request.rejected"):
    """The request was refused before any work was done, and why."""

    key_id: KeyId | None = None
    model: str | None = None
    code: str
    http_status: int
    stream: bool = False
    body_bytes: int = 0
    left_out: tuple[LeftOutLeg, ...] = ()  # the first of the places that the request didn't allow


class AttemptStarted(Event, frozen=True, kw_only=True, tag="attempt.started"):
    """A worker said that it has the job."""

    route: RouteId
    worker: WorkerId
    queue_us: int  # from acceptance to this


class AttemptLost(Event, frozen=True, kw_only=True, tag="attempt.lost"):
    """The ingress gave an attempt up and went on with another: its worker fell silent, failed or never came, or another was faster."""

    route: RouteId
    worker: WorkerId | None = None
    code: str
    upstream_status: int | None = None  # of the provider, if it gave one
    usage: Usage = (
        Usage()
    )  # what it used as far as the ingress can tell: the prompt once it had begun, the tokens that came
    cost_pico: int = 0  # of that at the route's price; the client pays nothing of it
    tokens_carried: int = (
        0  # completion tokens that the client has of the answer, from this attempt and those before it
    )


class StreamMigrated(Event, frozen=True, kw_only=True, tag="stream.migrated"):
    """An answer that its client had begun to read went on at another worker. ``epoch`` is the attempt that went on with it."""

    route: RouteId
    worker: WorkerId | None
    from_route: RouteId
    from_worker: WorkerId | None = None
    reason: str  # the code of what ended the attempt before
    how: str  # exact | prefix
    tokens_carried: int = 0  # completion tokens that its client had by then
    gap_us: int = 0  # without a token: from the last one of the attempt before to the first one of this


class AttemptFinished(Event, frozen=True, kw_only=True, tag="attempt.finished"):
    """The worker's receipt: what was generated, what the provider says, how it ended."""

    key_id: KeyId
    route: RouteId
    worker: WorkerId
    provider: str
    model: str
    upstream_model: str
    outcome: str  # completed | failed | cancelled | handed_back
    code: str | None = None  # the fault's code, or the reason of a cancel or hand-back
    upstream_status: int | None = None
    upstream_id: str | None = None  # the provider's own id of the answer
    usage: Usage | None = None  # as the provider reported it
    tokens_sent: int = 0  # completion tokens in the frames sent, as the worker counts them
    tokens_carried: int = 0  # of a continuation: those that its client had before it, which are prompt to its provider
    first_token_us: int | None = None  # from the worker's start of the attempt
    duration_us: int = 0
    finish_reason: str | None = None
    tries: int = 1  # how often the provider was asked, with the same key or another


class RequestFinished(Event, frozen=True, kw_only=True, tag="request.finished"):
    """The request is over: what was delivered and what it costs. Durable before the client's last byte."""

    key_id: KeyId
    model: str
    route: RouteId | None = None  # of the last attempt
    worker: WorkerId | None = None
    status: str  # completed | failed | cancelled
    http_status: int
    code: str | None = None  # of the error, or why it was cancelled
    stream: bool
    accepted_ns: int  # UTC
    queue_us: int | None = None  # accepted -> started
    first_token_us: int | None = None  # accepted -> first chunk ready for the client
    duration_us: int = 0  # accepted -> this event
    usage: Usage = Usage()
    estimated: bool = False  # the usage is counted by us, not reported by the provider
    price: Price
    cost_pico: int = 0
    attempts: int = 1
    migrations: int = 0
    cached: bool = False
    finish_reason: str | None = None
    prompt_hash: str
    hold_pico: int = 0  # the hold that this settles or releases


class RequestReplayed(Event, frozen=True, kw_only=True, tag="request.replayed"):
    """What this request's client was told was told again: to a retry, or to a client whose connection broke. It costs nothing."""

    key_id: KeyId
    by: str  # how it was asked for: idempotency_key | last_event_id
    running: bool  # whether the request was still under way
    after: int = 0  # the events that the client had already


AnyEvent = (
    RequestAccepted
    | RequestRejected
    | AttemptStarted
    | AttemptLost
    | StreamMigrated
    | AttemptFinished
    | RequestFinished
    | RequestReplayed
)
