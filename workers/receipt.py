"""What a worker puts on record of an attempt when it is over."""

from __future__ import annotations

import time

from schemas.events import AttemptFinished
from schemas.ids import EventId, WorkerId, new_id
from schemas.jobs import Cancelled, Completed, Failed, HandedBack, Job, Outcome
from workers.attempt import Progress
from workers.reporter import Reporter
from workers.route import Route


def receipt(
    job: Job, route: Route, report: Reporter, progress: Progress, outcome: Outcome, *, worker: WorkerId, producer: str
) -> AttemptFinished:
    """Of the attempt that has just ended with *outcome*."""
    kind, code, status = _told(outcome)
    first = progress.first_chunk
    return AttemptFinished(
        id=EventId(new_id()),
        ts_ns=time.time_ns(),
        org=job.org,
        request_id=job.request_id,
        epoch=job.epoch,
        producer=producer,
        key_id=job.key_id,
        route=route.id,
        worker=worker,
        provider=route.provider.name,
        model=job.model,
        upstream_model=route.provider.upstream_model(job.model),
        outcome=kind,
        code=code,
        upstream_status=status,
        upstream_id=progress.upstream_id,
        usage=progress.usage,
        tokens_sent=report.tokens,
        tokens_carried=0 if job.continuation is None else job.continuation.tokens,
        first_token_us=None if first is None else int((first - progress.began) * 1e6),
        duration_us=int((time.monotonic() - progress.began) * 1e6),
        finish_reason=progress.finish_reason,
        tries=progress.tries,
    )


def _told(outcome: Outcome) -> tuple[str, str | None, int | None]:
    """How the receipt tells an outcome: its kind, its code, the provider's status."""
    match outcome:
        case Completed():
            return "completed", None, None
        case Failed(fault=fault):
            return "failed", fault.code, fault.status
        case Cancelled(reason=reason):
            return "cancelled", reason, None
        case HandedBack(reason=reason):
            return "handed_back", reason, None
