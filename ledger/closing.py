"""How a request ends that its ingress left open when it died: by the receipts of its workers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from schemas.events import (
    INGRESS_LOST,
    AttemptFinished,
    AttemptLost,
    AttemptStarted,
    Event,
    RequestAccepted,
    RequestFinished,
    RequestRejected,
    StreamMigrated,
)
from schemas.ids import EventId
from schemas.money import Price, Usage, cost, estimate

HTTP_STATUS = 502  # its client saw the connection break; a proxy in between tells that so


def closing(events: Sequence[Event], *, id_: EventId, now_ns: int, producer: str) -> RequestFinished | None:
    """The event that closes the request whose *events* these are, in the log's order; None if it isn't open.

    What the last attempt's receipt says is billed: the provider's own figure, else what was sent; behind that what its client had
    before the answer broke off and moved there. Without any of it nothing is. What else reached the client nobody knows any more.
    """
    accepted = next((event for event in events if isinstance(event, RequestAccepted)), None)
    if accepted is None or any(isinstance(event, RequestFinished | RequestRejected) for event in events):
        return None
    receipt = _last_receipt(events)
    moves = [event for event in events if isinstance(event, StreamMigrated)]
    usage, estimated = _billed(accepted, receipt, carried=_carried(events))
    price = _price(accepted, receipt)
    started = [event for event in events if isinstance(event, AttemptStarted)]
    attempts = max((event.epoch for event in events), default=0)
    return RequestFinished(
        id=id_,
        ts_ns=now_ns,
        org=accepted.org,
        request_id=accepted.request_id,
        epoch=attempts,
        producer=producer,
        key_id=accepted.key_id,
        model=accepted.model if receipt is None else receipt.model,
        route=receipt.route if receipt else started[-1].route if started else None,
        worker=receipt.worker if receipt else started[-1].worker if started else None,
        status="failed",
        http_status=HTTP_STATUS,
        code=INGRESS_LOST,
        stream=accepted.stream,
        accepted_ns=accepted.ts_ns,
        queue_us=started[0].queue_us if started else None,
        duration_us=max(0, (now_ns - accepted.ts_ns) // 1000),
        usage=usage,
        estimated=estimated,
        price=price,
        cost_pico=cost(usage, price),
        attempts=attempts,
        migrations=len(moves),
        prompt_hash=accepted.prompt_hash,
        hold_pico=accepted.hold_pico,
    )


def _carried(events: Iterable[Event]) -> int:
    """What its client had before the last attempt began, as its ingress told, or its worker where the ingress could not any more."""
    told = (
        event.tokens_carried for event in events if isinstance(event, AttemptLost | StreamMigrated | AttemptFinished)
    )
    return max(told, default=0)


def _last_receipt(events: Iterable[Event]) -> AttemptFinished | None:
    """Of the attempts that the ingress had not given up. Where two ran side by side, the one that gave more."""
    events = list(events)
    lost = {event.epoch for event in events if isinstance(event, AttemptLost)}
    receipts = [event for event in events if isinstance(event, AttemptFinished) and event.epoch not in lost]
    return max(receipts, key=_weight, default=None)


def _weight(receipt: AttemptFinished) -> tuple[bool, bool, int, int]:
    ended_badly = receipt.outcome in ("failed", "handed_back")
    return receipt.outcome == "completed", not ended_badly, receipt.tokens_sent, receipt.epoch


def _billed(accepted: RequestAccepted, receipt: AttemptFinished | None, *, carried: int) -> tuple[Usage, bool]:
    """Tokens, and whether they are an estimate. *carried* of them had reached the client before the last attempt began.

    An attempt that gave nothing costs its client nothing.
    """
    gave = receipt is not None and (receipt.outcome == "completed" or receipt.tokens_sent > 0)
    if receipt is None or not gave:
        return (_estimate(accepted, carried), True) if carried else (Usage(), False)
    if carried or receipt.usage is None:  # to the provider of a continuation what was carried is prompt
        tokens = receipt.tokens_sent if receipt.usage is None else receipt.usage.completion_tokens
        return _estimate(accepted, carried + tokens), True
    return receipt.usage, False


def _estimate(accepted: RequestAccepted, completion_tokens: int) -> Usage:
    return estimate(prompt_bytes=accepted.prompt_bytes or accepted.body_bytes, completion_tokens=completion_tokens)


def _price(accepted: RequestAccepted, receipt: AttemptFinished | None) -> Price:
    """That of the place where it ran, as it was at admission."""
    if receipt is None:
        return accepted.price
    models = accepted.models or (accepted.model,) * len(accepted.plan)
    prices = accepted.prices or (accepted.price,) * len(accepted.plan)
    legs = zip(accepted.plan, models, prices, strict=False)
    return next((price for *leg, price in legs if leg == [receipt.route, receipt.model]), accepted.price)
