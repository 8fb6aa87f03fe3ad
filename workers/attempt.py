"""One attempt at a job, from its start to its outcome."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field

import structlog

from schemas.errors import Fault, ProviderFailed, ProviderTimeout
from schemas.jobs import Cancelled, Completed, HandedBack, Job, Outcome
from schemas.jobs import Failed as FailedOutcome
from schemas.money import Usage
from workers.providers.base import Provider
from workers.providers.patience import BEHIND_S
from workers.reporter import Reporter
from workers.seam import seamless

log = structlog.get_logger()

NOT_AN_ANSWER = frozenset({"abort", "error"})  # finish reasons with which engines say that they gave up


@dataclass(slots=True)
class Progress:
    """What is known of an attempt while it runs, and after. Times are monotonic seconds."""

    began: float = field(default_factory=time.monotonic)
    first_chunk: float | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    upstream_id: str | None = None
    tries: int = 1  # how often the provider was asked
    entered: bool = False  # its task has begun to run: from here on cancelling it is heard
    stop: Cancelled | HandedBack | None = None  # why it is to stop, if it is


async def run_attempt(job: Job, *, provider: Provider, report: Reporter, progress: Progress) -> Outcome:
    """Runs one attempt of *job* and returns how it ended; *progress* is kept up to date for the receipt.

    Sends, behind Started: frames with seq 1, 2, … without gaps, the last one of them a last frame.
    Raises: nothing of the provider's, its errors become an outcome. A cancelled task is the outcome ``progress.stop`` if that is
    set, and CancelledError if it isn't.
    """
    progress.entered = True
    outcome = await _outcome(job, provider, report, progress) if progress.stop is None else progress.stop
    report.ended(outcome)
    return outcome


async def _outcome(job: Job, provider: Provider, report: Reporter, progress: Progress) -> Outcome:
    outcome: Outcome
    total = asyncio.timeout(job.timeouts.total_s + BEHIND_S)
    try:
        async with total:
            await _relay(job, provider, report, progress)
        if progress.finish_reason in NOT_AN_ANSWER:
            outcome = FailedOutcome(fault=ProviderFailed("The provider gave up in the middle of the answer."))
        else:
            outcome = Completed(usage=progress.usage, finish_reason=progress.finish_reason)
    except Fault as fault:
        progress.tries = fault.tries
        outcome = FailedOutcome(fault=fault)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            if progress.stop is None:
                raise
            task.uncancel()
        # Else nobody cancelled us: a provider let a cancellation of its own out.
        outcome = FailedOutcome(fault=ProviderFailed("The provider adapter broke off."))
    except Exception as error:
        if isinstance(error, TimeoutError) and total.expired():
            outcome = FailedOutcome(fault=ProviderTimeout(f"The attempt took longer than {job.timeouts.total_s:g} s."))
        else:
            # A defect of ours in a provider must cost one request, not the worker.
            log.exception("provider_broke", provider=provider.name, request_id=job.request_id)
            outcome = FailedOutcome(fault=ProviderFailed("The provider adapter failed."))
    return progress.stop or outcome  # what a provider makes of being stopped is no fault of its own


async def _relay(job: Job, provider: Provider, report: Reporter, progress: Progress) -> None:
    wait_us = 0
    generated = provider.generate(job)
    async with aclosing(generated if job.continuation is None else seamless(generated)) as chunks:
        async for chunk in chunks:
            if progress.stop is not None:
                break  # a provider that goes on after it was cancelled
            if progress.first_chunk is None and chunk.members is not None:
                progress.first_chunk = time.monotonic()
                wait_us = int((progress.first_chunk - progress.began) * 1e6)
            progress.usage = chunk.usage or progress.usage
            progress.finish_reason = chunk.finish_reason or progress.finish_reason
            progress.upstream_id = chunk.upstream_id or progress.upstream_id
            progress.tries = chunk.tries
            report.chunk(chunk, wait_us=wait_us)
            wait_us = 0
