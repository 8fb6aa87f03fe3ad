"""One attempt: what a provider does, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest

from schemas.errors import PenstockError, ProviderFailed, ProviderNonsense, ProviderRejected, ProviderTimeout
from schemas.jobs import Cancelled, Completed, Failed, HandedBack, Job, Outcome, Timeouts
from schemas.money import Usage
from tests.factories import new_job
from tests.waiting import eventually
from workers.attempt import Progress, run_attempt
from workers.providers.base import Chunk

USAGE = Usage(prompt_tokens=3, completion_tokens=2)
PIECES = (
    Chunk(members=b'{"choices":[1]}', tokens=1, upstream_id="up-1"),
    Chunk(members=b'{"choices":[2]}', tokens=1, finish_reason="stop"),
    Chunk(members=None, usage=USAGE, usage_raw=b"{}"),
)

Generate = Callable[[Job], AsyncIterator[Chunk]]


class Scripted:
    """A provider that does as it is told, and says when its work was ended."""

    name = "scripted"

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self.closed = 0

    async def generate(self, job: Job) -> AsyncIterator[Chunk]:
        try:
            async for chunk in self._generate(job):
                yield chunk
        finally:
            self.closed += 1


class Told:
    """As much of a reporter as an attempt needs."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.waits_us: list[int] = []
        self.outcomes: list[Outcome] = []

    def chunk(self, chunk: Chunk, *, wait_us: int = 0) -> None:
        assert not self.outcomes, "a chunk behind the end"
        self.chunks.append(chunk)
        self.waits_us.append(wait_us)

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


async def test_what_the_provider_said_is_reported_and_known() -> None:
    provider, told, progress = Scripted(_says(*PIECES)), Told(), Progress()
    outcome = await _run(provider, told, progress)
    assert outcome == Completed(usage=USAGE, finish_reason="stop")
    assert told.chunks == list(PIECES)
    assert told.outcomes == [outcome]
    assert (progress.usage, progress.finish_reason, progress.upstream_id) == (USAGE, "stop", "up-1")
    assert progress.first_chunk is not None
    assert provider.closed == 1


async def test_the_first_chunk_alone_says_how_long_the_provider_took() -> None:
    told = Told()
    await _run(Scripted(_says(Chunk(members=None, upstream_id="x"), *PIECES)), told)
    assert [wait > 0 for wait in told.waits_us] == [False, True, False, False]


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_an_engine_that_gives_up_has_not_completed(reason: str) -> None:
    outcome = await _run(Scripted(_says(PIECES[0], Chunk(members=b"{}", finish_reason=reason))))
    assert isinstance(outcome, Failed)
    assert outcome.fault.code == "upstream_error"


@pytest.mark.parametrize("before", [0, 2])
async def test_a_fault_is_an_outcome_behind_what_came_before_it(before: int) -> None:
    fault = ProviderRejected("no", status=400)
    told = Told()
    outcome = await _run(Scripted(_says(*PIECES[:before], then=fault)), told)
    assert outcome == Failed(fault=fault)
    assert told.chunks == list(PIECES[:before])


@pytest.mark.parametrize(
    "nonsense",
    [
        RuntimeError("secret prompt"),
        TypeError(),
        KeyError("x"),
        AssertionError(),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "x"),
        ExceptionGroup("several", [ValueError(), OSError()]),
        PenstockError("ours, and no fault"),
        TimeoutError(),
        StopAsyncIteration(),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_else_a_provider_raises_is_a_failure_of_this_attempt(nonsense: BaseException) -> None:
    """Also a time-out of its own, and a cancellation that nobody asked for."""
    outcome = await _run(Scripted(_says(PIECES[0], then=nonsense)))
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.fault, ProviderFailed)
    assert "secret" not in outcome.fault.message


async def test_a_provider_that_is_no_provider_is_a_failure_of_this_attempt() -> None:
    class Empty:
        name = "empty"

    assert isinstance(await _run(Empty()), Failed)


@pytest.mark.parametrize("chunk", [None, b"", 7, "text"])
async def test_a_chunk_that_is_none_is_a_failure_of_this_attempt(chunk: Any) -> None:
    assert isinstance(await _run(Scripted(_says(chunk))), Failed)


async def test_a_chunk_that_can_not_be_carried_ends_the_work() -> None:
    class Full(Told):
        def chunk(self, _: Chunk, **__: Any) -> None:
            raise ProviderNonsense

    provider = Scripted(_says(*PIECES))
    outcome = await _run(provider, Full())
    assert isinstance(outcome, Failed)
    assert outcome.fault.code == "upstream_invalid_response"
    assert provider.closed == 1


async def test_the_whole_attempt_has_a_time_out() -> None:
    provider = Scripted(_hangs(PIECES[0]))
    outcome = await _run(provider, job=new_job(timeouts=Timeouts(total_s=0.05)))
    assert isinstance(outcome, Failed)
    assert isinstance(outcome.fault, ProviderTimeout)
    assert "0.05 s" in outcome.fault.message
    assert provider.closed == 1


@pytest.mark.parametrize("why", [Cancelled(reason="client_left"), HandedBack(reason="worker_draining")])
async def test_a_stopped_attempt_says_why_and_has_ended_its_work(why: Cancelled | HandedBack) -> None:
    provider, told, progress = Scripted(_hangs(PIECES[0])), Told(), Progress()
    task = asyncio.create_task(_run(provider, told, progress))
    await eventually(lambda: told.chunks, every_s=0)
    progress.stop = why
    task.cancel()
    assert await task == why
    assert told.outcomes == [why]
    assert provider.closed == 1
    assert task.cancelling() == 0


async def test_one_stopped_before_it_began_does_no_work() -> None:
    provider, told, progress = Scripted(_says(*PIECES)), Told(), Progress()
    progress.stop = HandedBack(reason="worker_draining")
    assert await _run(provider, told, progress) == progress.stop
    assert told.outcomes == [progress.stop]
    assert (provider.closed, told.chunks) == (0, [])


async def test_a_cancellation_without_a_reason_is_passed_on() -> None:
    provider, told = Scripted(_hangs(PIECES[0])), Told()
    task = asyncio.create_task(_run(provider, told))
    await eventually(lambda: told.chunks, every_s=0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told.outcomes == []
    assert provider.closed == 1


@pytest.mark.parametrize(
    "makes", [ProviderFailed("gone"), RuntimeError(), ProviderRejected()], ids=lambda e: type(e).__name__
)
async def test_what_a_provider_makes_of_being_stopped_is_no_fault(makes: Exception) -> None:
    async def generate(_: Job) -> AsyncIterator[Chunk]:
        yield PIECES[0]
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise makes from None

    await _stopped(Scripted(generate))


async def test_a_provider_that_goes_on_after_it_was_stopped_is_left() -> None:
    went_on = 0

    async def generate(_: Job) -> AsyncIterator[Chunk]:
        nonlocal went_on
        yield PIECES[0]
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
            went_on += 1
            yield PIECES[1]

    await _stopped(Scripted(generate))
    assert went_on == 1


async def test_a_provider_that_ends_well_although_it_was_stopped_was_stopped() -> None:
    async def generate(_: Job) -> AsyncIterator[Chunk]:
        yield PIECES[0]
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    await _stopped(Scripted(generate))


async def test_usage_that_was_told_before_the_stop_is_known() -> None:
    provider, told, progress = Scripted(_hangs(*PIECES)), Told(), Progress()
    task = asyncio.create_task(_run(provider, told, progress))
    await eventually(lambda: len(told.chunks) == 3, every_s=0)
    progress.stop = Cancelled(reason="client_left")
    task.cancel()
    await task
    assert progress.usage == USAGE


async def _stopped(provider: Scripted) -> None:
    told, progress = Told(), Progress()
    task = asyncio.create_task(_run(provider, told, progress))
    await eventually(lambda: told.chunks, every_s=0)
    await asyncio.sleep(0)
    progress.stop = Cancelled(reason="client_left")
    task.cancel()
    assert await task == progress.stop
    assert told.outcomes == [progress.stop]
    assert provider.closed == 1


async def _run(provider: Any, told: Any = None, progress: Progress | None = None, job: Job | None = None) -> Outcome:
    told, progress = told or Told(), progress or Progress()
    return await run_attempt(job or new_job(), provider=provider, report=told, progress=progress)


def _says(*chunks: Chunk, then: BaseException | None = None) -> Generate:
    async def generate(_: Job) -> AsyncIterator[Chunk]:
        for chunk in chunks:
            yield chunk
        if then is not None:
            raise then

    return generate


def _hangs(*chunks: Chunk) -> Generate:
    async def generate(_: Job) -> AsyncIterator[Chunk]:
        for chunk in chunks:
            yield chunk
        await asyncio.Event().wait()

    return generate
