"""The whole life of one request in words: its events in order, with their times."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, assert_never

from schemas.events import (
    AnyEvent,
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
from schemas.ids import RequestId, completion_id
from schemas.money import Price, Usage, dollars
from schemas.upcasters import Known, UnknownEvent

EVENTS_OF_REQUEST = """\
SELECT position, ts, kind, producer, payload::VARCHAR AS payload
FROM events WHERE request_id = ?::UUID ORDER BY ts, position"""


class Moment(NamedTuple):
    """One event. ``offset_ms`` counts from the first one shown."""

    ts_ns: int
    offset_ms: float
    kind: str
    producer: str
    text: str


class Life(NamedTuple):
    request_id: RequestId
    summary: str
    moments: list[Moment]


def tell(request_id: RequestId, events: Sequence[Known | UnknownEvent]) -> Life:
    """The story of *events*, which are all of the request's; at least one."""
    known = _in_order([e for e in events if isinstance(e, Event)])
    unknown = [e for e in events if isinstance(e, UnknownEvent)]
    first_ns = known[0].ts_ns if known else 0
    moments = [
        Moment(e.ts_ns, (e.ts_ns - first_ns) / 1e6, str(e.__struct_config__.tag), e.producer, words(e)) for e in known
    ]
    moments += [
        Moment(0, 0.0, e.kind, str(e.members.get("producer", "")), "an event that only a newer release can read")
        for e in unknown
    ]
    return Life(request_id, _summary(known), moments)


def _in_order(events: Sequence[AnyEvent]) -> list[AnyEvent]:
    """By time, but never before what caused it, for the witnesses' clocks may differ. At one time, by cause and then as logged."""
    accepted_ns = max((e.ts_ns for e in events if isinstance(e, RequestAccepted)), default=0)
    begun = {e.epoch: max(e.ts_ns, accepted_ns) for e in events if isinstance(e, AttemptStarted)}

    def when(event: AnyEvent) -> tuple[int, int, int, int]:
        match event:
            case RequestAccepted():
                return accepted_ns, 0, 0, 0
            case AttemptStarted():
                return begun[event.epoch], 1, event.epoch, 0
            case AttemptLost() | StreamMigrated() | AttemptFinished():
                return max(event.ts_ns, begun.get(event.epoch, accepted_ns)), 1, event.epoch, 1
            case _:
                return max(event.ts_ns, accepted_ns, *begun.values()), 2, 0, 0

    return sorted(events, key=when)


def words(event: AnyEvent) -> str:  # noqa: PLR0911 - one for each kind
    """What *event* says, for people."""
    match event:
        case RequestAccepted():
            sent = "a stream" if event.stream else "one answer"
            return (
                f"accepted: {event.model}, {sent}, {event.body_bytes} bytes, key {event.key_id} of {event.org}; "
                f"plan {_plan(event)}; {_price(event.price)}{_left_out(event)}"
            )
        case RequestRejected():
            who = f"{_of_key(event.key_id)}{_of_model(event.model)}"
            return f"rejected with {event.http_status} {event.code}{who}{_left_out(event)}"
        case AttemptStarted():
            return f"attempt {event.epoch} started at {event.worker} on {event.route} after {_ms(event.queue_us)} in the queue"
        case AttemptLost():
            return _given_up(event)
        case StreamMigrated():
            return (
                f"went on as attempt {event.epoch} at {event.worker or 'no worker'} on {event.route}, {event.how}, behind "
                f"{event.tokens_carried} tokens of {event.from_worker or 'no worker'} on {event.from_route} "
                f"({event.reason}); {_ms(event.gap_us)} without a token"
            )
        case AttemptFinished():
            return _receipt(event)
        case RequestFinished():
            return _finished(event)
        case RequestReplayed():
            return _replayed(event)
        case _:
            assert_never(event)


def _given_up(event: AttemptLost) -> str:
    status = "" if event.upstream_status is None else f", HTTP {event.upstream_status}"
    ours = f"; at our cost: {_tokens(event.usage)}, ${dollars(event.cost_pico)}" if event.usage.total_tokens else ""
    return (
        f"attempt {event.epoch} given up: {event.code} ({event.worker or 'no worker'} on {event.route}{status}){ours}"
    )


def _plan(event: RequestAccepted) -> str:
    """The routes in order, each with the model if that is another one, and with the reason for its place."""
    models = event.models or (event.model,) * len(event.plan)
    reasons = event.reasons or ("",) * len(event.plan)
    legs = []
    for route, model, reason in zip(event.plan, models, reasons, strict=False):
        as_model = "" if model == event.model else f" as {model}"
        legs.append(f"{route}{as_model} ({reason})" if reason else f"{route}{as_model}")
    return " → ".join(legs)


def _left_out(event: RequestAccepted | RequestRejected) -> str:
    told = [
        f"{leg.route or 'all routes'}{'' if leg.model == event.model else f' as {leg.model}'} ({leg.why})"
        for leg in event.left_out
    ]
    return f"; left out: {', '.join(told)}" if told else ""


def _receipt(event: AttemptFinished) -> str:
    parts = [f"attempt {event.epoch} {event.outcome.replace('_', ' ')}{_because(event.code)} at {event.worker}"]
    upstream = f"{event.provider} as {event.upstream_model}"
    parts.append(f"{upstream}, HTTP {event.upstream_status}" if event.upstream_status is not None else upstream)
    parts.append(
        f"reported {_tokens(event.usage)}" if event.usage else f"no usage reported, {event.tokens_sent} tokens sent"
    )
    if event.first_token_us is not None:
        parts.append(f"first token after {_ms(event.first_token_us)}")
    parts.append(f"took {_ms(event.duration_us)}")
    if event.finish_reason:
        parts.append(f"finish reason {event.finish_reason}")
    return "; ".join(parts)


def _finished(event: RequestFinished) -> str:
    parts = [f"{event.status}{_because(event.code)} with HTTP {event.http_status}"]
    if event.cached:
        parts.append("answered from the cache")
    parts.append(f"{_tokens(event.usage)}{' (estimated)' if event.estimated else ''}")
    parts.append(f"cost ${dollars(event.cost_pico)}")
    parts.append(f"{event.attempts} {'attempt' if event.attempts == 1 else 'attempts'}")
    if event.migrations:
        parts.append(f"moved {'once' if event.migrations == 1 else f'{event.migrations} times'}")
    if event.first_token_us is not None:
        parts.append(f"first token after {_ms(event.first_token_us)}")
    parts.append(f"took {_ms(event.duration_us)}")
    if event.finish_reason:
        parts.append(f"finish reason {event.finish_reason}")
    return "; ".join(parts)


def _replayed(event: RequestReplayed) -> str:
    when = "while it ran" if event.running else "after its end"
    start = f"from event {event.after + 1} on" if event.after else "from the beginning"
    return f"told again {when} ({event.by}), {start}{_of_key(event.key_id)}; costs nothing"


def _summary(events: Sequence[Event]) -> str:
    for event in reversed(events):
        match event:
            case RequestFinished():
                return f"{event.status}, HTTP {event.http_status}, {_tokens(event.usage)}, ${dollars(event.cost_pico)}"
            case RequestRejected():
                return f"rejected, HTTP {event.http_status}, {event.code}"
    return "open: it has not finished, or its end has not been written yet"


def clock(ts_ns: int) -> str:
    """UTC to the microsecond."""
    return (
        datetime.fromtimestamp(ts_ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S.")
        + f"{ts_ns // 1000 % 1_000_000:06d}"
    )


def as_json(life: Life, events: Sequence[Any]) -> dict[str, Any]:
    """*life* for programs; *events* are the stored events, in the log's order."""
    return {
        "request_id": life.request_id,
        "completion_id": completion_id(life.request_id),
        "summary": life.summary,
        "moments": [
            {
                "at": clock(m.ts_ns).replace(" ", "T") + "Z",
                "offset_ms": round(m.offset_ms, 3),
                "kind": m.kind,
                "producer": m.producer,
                "text": m.text,
            }
            for m in life.moments
        ],
        "events": events,
    }


def _tokens(usage: Usage) -> str:
    classes = [
        f"{count} {name}"
        for count, name in (
            (usage.cached_tokens, "cached"),
            (usage.reasoning_tokens, "reasoning"),
            (usage.audio_prompt_tokens + usage.audio_completion_tokens, "audio"),
        )
        if count
    ]
    of_them = f" ({', '.join(classes)})" if classes else ""
    return f"{usage.prompt_tokens} prompt + {usage.completion_tokens} completion tokens{of_them}"


def _price(price: Price) -> str:
    if price.unknown:
        return "price unknown"
    if not (price.input or price.output):
        return "free"
    return f"${_per_million(price.input)} in, ${_per_million(price.output)} out per million tokens"


def _per_million(micro: int) -> str:
    return f"{micro / 1_000_000:.6f}".rstrip("0").rstrip(".")


def _ms(us: int) -> str:
    return f"{us / 1000:.1f} ms"


def _because(code: str | None) -> str:
    return f" ({code})" if code else ""


def _of_key(key_id: str | None) -> str:
    return f", key {key_id}" if key_id else ", no known key"


def _of_model(model: str | None) -> str:
    return f", model {model}" if model else ""
