"""Events to the facts that the views are made of: pure, one event at a time."""

from __future__ import annotations

from typing import assert_never

from ledger.clock import utc
from ledger.rows import EndRow, LossRow, OpenRow, ReceiptRow, StartRow
from schemas.events import (
    AnyEvent,
    AttemptFinished,
    AttemptLost,
    AttemptStarted,
    RequestAccepted,
    RequestFinished,
    RequestRejected,
    RequestReplayed,
    StreamMigrated,
)
from schemas.money import Usage

Fact = OpenRow | EndRow | StartRow | LossRow | ReceiptRow

_NOTHING = Usage()


def fact(event: AnyEvent, position: int) -> Fact | None:  # noqa: PLR0911 - one for each kind
    """What *event*, at *position* of EVENTS, states; None if the view ``events`` has all there is to it."""
    match event:
        case RequestFinished():
            return _finished(event, position)
        case AttemptFinished():
            return _receipt(event, position)
        case AttemptStarted():
            return StartRow(
                position=position,
                request_id=event.request_id,
                epoch=event.epoch,
                org=event.org,
                started_at=utc(event.ts_ns),
                route=event.route,
                worker=event.worker,
                queue_us=event.queue_us,
            )
        case RequestAccepted():
            return OpenRow(
                position=position,
                request_id=event.request_id,
                org=event.org,
                key_id=event.key_id,
                model=event.model,
                stream=event.stream,
                accepted_at=utc(event.ts_ns),
                prompt_hash=event.prompt_hash,
                ingress=event.producer,
                announced=event.announced,
            )
        case RequestRejected():
            return EndRow(
                position=position,
                request_id=event.request_id,
                org=event.org,
                key_id=event.key_id,
                model=event.model,
                status="rejected",
                http_status=event.http_status,
                code=event.code,
                stream=event.stream,
                accepted_at=utc(event.ts_ns),
                finished_at=utc(event.ts_ns),
            )
        case AttemptLost():
            return LossRow(
                position=position,
                request_id=event.request_id,
                epoch=event.epoch,
                org=event.org,
                lost_at=utc(event.ts_ns),
                route=event.route,
                worker=event.worker,
                code=event.code,
            )
        case RequestReplayed():
            return None  # nothing was generated, and nothing is billed
        case StreamMigrated():
            return None  # the event that ends its request counts it
        case _:
            assert_never(event)


def _finished(event: RequestFinished, position: int) -> EndRow:
    usage = event.usage
    return EndRow(
        position=position,
        request_id=event.request_id,
        org=event.org,
        key_id=event.key_id,
        model=event.model,
        route=event.route,
        worker=event.worker,
        status=event.status,
        http_status=event.http_status,
        code=event.code,
        stream=event.stream,
        accepted_at=utc(event.accepted_ns),
        finished_at=utc(event.ts_ns),
        queue_us=event.queue_us,
        first_token_us=event.first_token_us,
        duration_us=event.duration_us,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        audio_prompt_tokens=usage.audio_prompt_tokens,
        audio_completion_tokens=usage.audio_completion_tokens,
        cost_pico=event.cost_pico,
        attempts=event.attempts,
        migrations=event.migrations,
        cached=event.cached,
        finish_reason=event.finish_reason,
        estimated=event.estimated,
        prompt_hash=event.prompt_hash,
        price_known=not event.price.unknown,
    )


def _receipt(event: AttemptFinished, position: int) -> ReceiptRow:
    said = event.usage is not None
    usage = event.usage or _NOTHING
    return ReceiptRow(
        position=position,
        request_id=event.request_id,
        epoch=event.epoch,
        org=event.org,
        key_id=event.key_id,
        finished_at=utc(event.ts_ns),
        route=event.route,
        worker=event.worker,
        provider=event.provider,
        model=event.model,
        upstream_model=event.upstream_model,
        outcome=event.outcome,
        code=event.code,
        upstream_status=event.upstream_status,
        upstream_id=event.upstream_id,
        first_token_us=event.first_token_us,
        duration_us=event.duration_us,
        prompt_tokens=usage.prompt_tokens if said else None,
        completion_tokens=usage.completion_tokens if said else None,
        cached_tokens=usage.cached_tokens if said else None,
        reasoning_tokens=usage.reasoning_tokens if said else None,
        tokens_sent=event.tokens_sent,
        finish_reason=event.finish_reason,
    )
