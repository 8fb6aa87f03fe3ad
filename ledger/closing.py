"""How a request ends that its ingress left open when it died: by the receipts of its workers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.events import (
    BEGUN_ELSEWHERE,
    HEDGE_LOST,
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

    What the last attempt's receipt says is billed: the provider's own figure, else what was sent; and with it what its client had
    before the answer broke off and moved there. Without any of it nothing is. What else reached the client nobody knows any more.
    """
    accepted = next((event for event in events if isinstance(event, RequestAccepted)), None)
    if accepted is None or any(isinstance(event, RequestFinished | RequestRejected) for event in events):
        return None
    receipt = _last_receipt(events)
    moves = [event for event in events if isinstance(event, StreamMigrated)]
    usage, estimated = _billed(accepted, receipt, events)
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


def _last_receipt(events: Sequence[Event]) -> AttemptFinished | None:
    """Of the attempts that the ingress had not given up. Where there are several, the one with which its client had most."""
    lost = {event.epoch for event in events if isinstance(event, AttemptLost)}
    # The queue may give one job to two workers: its client hears the one that the ingress heard begin.
    heard = {event.epoch: event.worker for event in events if isinstance(event, AttemptStarted)}
    receipts = [
        event
        for event in events
        if isinstance(event, AttemptFinished)
        and event.epoch not in lost
        and event.code not in (BEGUN_ELSEWHERE, HEDGE_LOST)
        and heard.get(event.epoch, event.worker) == event.worker
    ]
    return max(receipts, key=lambda receipt: _weight(receipt, events), default=None)


def _weight(receipt: AttemptFinished, events: Sequence[Event]) -> tuple[bool, bool, int, int]:
    ended_badly = receipt.outcome in ("failed", "handed_back")
    had = _carried(events, receipt.epoch) + receipt.tokens_sent
    return receipt.outcome == "completed", not ended_badly, had, receipt.epoch


def _carried(events: Sequence[Event], epoch: int | None = None) -> int:
    """What its client had before the attempt *epoch* began; without one, before the last that anybody tells of.

    The ingress tells it, or a worker where the ingress could not any more; of an attempt that was lost, what the next began with.
    """
    told = (
        (event.epoch + isinstance(event, AttemptLost), event.tokens_carried)
        for event in events
        if isinstance(event, AttemptLost | StreamMigrated | AttemptFinished)
    )
    return max((tokens for begun, tokens in told if epoch is None or begun <= epoch), default=0)


def _billed(accepted: RequestAccepted, receipt: AttemptFinished | None, events: Sequence[Event]) -> tuple[Usage, bool]:
    """Tokens, and whether they are an estimate: never fewer than the client is known to have had.

    An attempt that gave nothing costs its client nothing.
    """
    known = _carried(events)
    if receipt is None or not (receipt.outcome == "completed" or receipt.tokens_sent > 0):
        return (_estimate(accepted, known), True) if known else (Usage(), False)
    carried = _carried(events, receipt.epoch)
    tokens = carried + (receipt.tokens_sent if receipt.usage is None else receipt.usage.completion_tokens)
    if carried or receipt.usage is None or tokens < known:  # to a continuation's provider what was carried is prompt
        return _estimate(accepted, max(tokens, known)), True
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
