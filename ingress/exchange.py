"""One accepted request, from its job to its last byte: its attempts, the client's leaving, and the end."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import assert_never

import msgspec
import structlog
from msgspec import Raw
from starlette.types import Receive

from bus.claims import Claims
from bus.log import EventLog
from bus.queue import JobQueue
from ingress.answer import Answer
from ingress.attempt import Attempt
from ingress.books import Books, Break, Broke, Done, Ending, Left
from ingress.continuing import Onward
from ingress.hedging import Hedges
from ingress.neighbours import Neighbours
from ingress.overdue import Overdue
from ingress.policy.drain import Drain
from ingress.policy.routing import Leg
from ingress.policy.trail import Trail
from ingress.policy.waits import Waits
from ingress.problems import fault_of, problem_of
from ingress.receipts import Receipts
from ingress.relay import Switchboard, heard
from ingress.router import Router
from ingress.sse import usage_json
from ingress.stopping import uncancel
from schemas.errors import (
    NoLiveRoute,
    PenstockError,
    ProviderNonsense,
    Stopping,
    TotalTimeout,
    WorkerLost,
    WorkerStalled,
    WorkerYielded,
)
from schemas.events import HEDGE_LOST
from schemas.frames import NOT_TOLD, Delta, Faulted, Finished, Started, Yielded
from schemas.ids import IngressId, new_nonce
from schemas.jobs import Job, Timeouts
from schemas.money import Usage

log = structlog.get_logger()

OnUnserved = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Services:
    """What an exchange works with."""

    ingress: IngressId
    log: EventLog
    refusals: EventLog  # complete in themselves, so no fence keeps them out
    queue: JobQueue
    switchboard: Switchboard
    router: Router
    timeouts: Timeouts
    keep_alive_comment_s: float
    claims: Claims | None = None  # over all ingresses; None: there is no other
    neighbours: Neighbours | None = None  # who may have answers that clients ask for here; None: nobody
    drain: Drain = field(default_factory=Drain)
    hedges: Hedges | None = None  # None: no second attempt while one runs
    receipts: Receipts | None = None  # None: what a worker could not say is estimated
    overdue: Overdue | None = None  # None: what the queue gives to a silent worker waits for `ack_wait`


class Exchange:
    """Serves one accepted request and closes its books."""

    def __init__(self, services: Services, books: Books, *, body: bytes, waits: Waits) -> None:
        self.books = books
        self._s = services
        self._body = body
        self._waits = waits
        self._trail = Trail(books.plan, workers=services.router.servers, is_up=services.router.is_up)
        self._continuing = services.router.continuing(books.request, body, books.plan)
        self._onward: Onward | None = None  # where the present attempt goes on with an answer
        self._break: Break | None = None  # what it has to make good, until it speaks
        self._running: list[Attempt] = []  # one; two while they race
        self._gone: str | None = None  # why the client is there no more
        self._comment_at = 0.0
        self._hedge_at = math.inf  # when a second attempt begins beside the first
        self._on_unserved: OnUnserved | None = None
        self._answer: Answer
        self._limit: asyncio.Timeout

    async def run(self, answer: Answer, receive: Receive, *, on_unserved: OnUnserved | None = None) -> None:
        """Serves the request on *answer*. Watches *receive* for the client's leaving all the while.

        If it was neither served nor billed, *on_unserved* is awaited before anybody hears of that.
        """
        self._answer, self._on_unserved = answer, on_unserved
        listener = asyncio.create_task(self._listen(receive))
        try:
            async with asyncio.timeout(self._waits.total_s) as self._limit:
                ending = await self._serve()
        except TimeoutError:
            ending = self._given_up()
        except asyncio.CancelledError:
            # The process stops and will wait no longer: the books are closed all the same.
            self._stop("ingress_stopping")
            uncancel()
            await self._close(Broke(Stopping()))
            return
        except PenstockError as error:
            self._stop(error.code)
            # Without its traceback, which has this frame and so the error itself: a cycle.
            ending = Broke(error.with_traceback(None)) if self._gone is None else self._left(self._gone)
        except Exception:
            log.exception("exchange_broke", request_id=self.books.arrival.request_id)
            self._stop("internal_error")
            ending = Broke(PenstockError())
        finally:
            listener.cancel()
        await self._close(ending)

    async def _serve(self) -> Ending:
        """Attempts, until one ends the request. Raises: PenstockError of the last of them."""
        self.books.open()
        await self._begin(self._trail.first())
        await self.books.opened()  # no byte goes out before both are on record
        now = time.monotonic()
        for attempt in self._running:
            attempt.heard_at = now
        self._comment_at = now + self._s.keep_alive_comment_s
        if self._s.hedges is not None and self.books.request.stream:  # else a first token isn't seen before the last
            self._hedge_at = now + self._s.hedges.after_s(self._running[0].leg)
        while True:
            await heard([attempt.relay for attempt in self._running], self._wake_at())
            now = time.monotonic()
            for attempt in tuple(self._running):
                if self._gone is not None:
                    return self._left(self._gone)
                if attempt not in self._running:
                    continue  # the other one has just won
                ending = await self._look(attempt, now)
                if ending is not None:
                    return ending
            if now >= self._hedge_at:
                await self._hedge()
            if now >= self._comment_at:  # timers may be a millisecond early
                await self._answer.keep_alive()
                self._comment_at = now + self._s.keep_alive_comment_s

    def _wake_at(self) -> float:
        return min(self._comment_at, self._hedge_at, *(attempt.look_at for attempt in self._running))

    async def _look(self, attempt: Attempt, now: float) -> Ending | None:
        """Takes what came of *attempt*, and goes on with another if it has failed. Raises: PenstockError if there is none."""
        try:
            ending = await self._take(attempt, now)
        except PenstockError as error:
            return await self._go_on(attempt, error)
        if self._gone is not None:
            return self._left(self._gone)
        if ending is not None:
            self._drop(attempt, "done")
        return ending

    async def _begin(self, leg: Leg) -> None:
        """An attempt at *leg* begins, or where it can't, the next that can. Raises: PenstockError if none can."""
        attempt = self._start(leg)
        self._trail.begin(leg)
        try:
            await attempt.publish()
        except PenstockError as error:
            await self._go_on(attempt, error)

    def _start(self, leg: Leg, onward: Onward | None = None, *, until: float | None = None) -> Attempt:
        attempt = Attempt(
            self._job(leg, onward),
            self._s.router.begin(leg, stream=self.books.request.stream),
            queue=self._s.queue,
            switchboard=self._s.switchboard,
            drain=self._s.drain,
            on_overflow=self._give_up,
            to=() if onward is None else onward.workers,
            until=until,
            overdue=self._s.overdue,
        )
        self._running.append(attempt)
        self.books.note_attempt()
        if attempt is self._running[0]:
            self.books.note_present(attempt)
        return attempt

    async def _go_on(self, attempt: Attempt, error: PenstockError) -> Ending | None:
        """*attempt* ended with *error*: another one begins, or nothing helps any more. Raises: *error* then.

        What has reached the client can't be taken back: from then on only a continuation helps.
        """
        if not self._waits.impatient(error, self._s.router.timeouts(attempt.leg)):
            attempt.trip.failed(error)
        self._drop(attempt, error.code)
        if self._gone is not None:
            raise error
        self._trail.failed(attempt.leg, attempt.worker, error)
        if self._answer.delivered:
            return await self._continue(attempt, error)
        self.books.tried = self._trail.told()
        if self._running:  # the other one of a race goes on
            self.books.note_lost(attempt, error)
            self.books.note_present(self._running[0])
            return None
        leg = self._trail.next()
        if leg is None:
            raise error
        self.books.note_lost(attempt, error)
        await self._begin(leg)
        return None

    async def _continue(self, attempt: Attempt, error: PenstockError) -> Ending | None:
        """Has another worker go on with the answer that *attempt* was giving. Raises: the error that broke it off, if none can."""
        delivered = self._continuing.delivered
        if delivered.finish_reason is not None:  # only its worker's last word was lost
            return Done(await self._last_word(attempt, delivered.finish_reason))
        if self._break is None:
            self._break = Break(error, attempt.route, attempt.worker, attempt.heard_at)
            self.books.carry(attempt, delivered.tokens)
        room_lacked = isinstance(error, WorkerYielded) and attempt.started_at is None
        (self._continuing.declined if room_lacked else self._continuing.failed)(attempt.worker)
        if attempt.waited_in_vain:
            raise error
        since = self._break.heard_at
        onward = await self._continuing.await_next(
            attempt.leg, self._break.error, since=since, gone=lambda: self._gone is not None
        )
        if onward is None:
            raise self._break.error
        self._onward = onward
        self.books.note_lost(attempt, error)
        timeouts = attempt.job.timeouts
        until = since + min(timeouts.queue_s, timeouts.idle_s) if onward.waits else None
        await self._start(onward.leg, onward, until=until).publish()
        return None

    def _widen(self, attempt: Attempt, onward: Onward) -> None:
        """Whoever has come meanwhile and can go on is asked, too. Raises: NoLiveRoute if nobody is left who can."""
        workers = self._continuing.standby(onward)
        if not workers:
            raise NoLiveRoute("The last worker that could go on has gone.")
        attempt.ask(worker for worker in workers if worker not in attempt.asked)

    async def _hedge(self) -> None:
        """A second attempt begins beside the one that says nothing, where there is a place for it."""
        self._hedge_at = math.inf
        hedges, (silent, *_) = self._s.hedges, self._running
        leg = self._trail.beside(silent.leg)
        if leg is not None and hedges is not None and hedges.take():
            await self._begin(leg)

    def _prefer(self, winner: Attempt) -> None:
        """*winner* is the one that counts; another that runs beside it is stopped, at our cost."""
        self._hedge_at = math.inf
        for loser in [attempt for attempt in self._running if attempt is not winner]:
            self._trail.outrun(loser.leg, loser.worker)
            self.books.tried = self._trail.told()
            self.books.note_outrun(loser)
            self._drop(loser, HEDGE_LOST)
        self.books.note_present(winner)

    def _drop(self, attempt: Attempt, reason: str) -> None:
        """*attempt* is over for us; what of it still runs is stopped."""
        attempt.stop(reason)
        attempt.close()
        self._running.remove(attempt)

    async def _take(self, attempt: Attempt, now: float) -> Ending | None:
        """Delivers what came of *attempt*. Raises: PenstockError that ended it."""
        frames = attempt.poll(now)
        for frame in frames:
            match frame:
                case Started():
                    self.books.note_started(attempt, at=attempt.relay.started_at)
                case Delta():
                    self.books.note_chunks(attempt, frame, now=now)
                case Finished():
                    self.books.note_chunks(attempt, frame, now=now)
                    if attempt.first_token_at is None:
                        raise ProviderNonsense("The provider finished without an answer.")
                    self._prefer(attempt)
                    self._note_spoken(attempt)
                    # What came along with the end goes out with it, behind the closing event.
                    return Done(self._whole(attempt, _with_chunks(attempt.held, frame)))
                case Faulted():
                    await self._deliver(attempt)
                    raise fault_of(frame)
                case Yielded():
                    await self._deliver(attempt)
                    raise WorkerYielded(f"The worker handed the request back ({frame.reason}).")
                case _:
                    assert_never(frame)
        if frames:
            self._comment_at = now + self._s.keep_alive_comment_s
            await self._deliver(attempt)
        elif attempt.started_at is None and self._onward is not None and self._onward.waits:
            self._widen(attempt, self._onward)
        elif attempt.started_at is None and self._trail.elsewhere(attempt.leg):
            raise NoLiveRoute("The last worker of this route has gone.")
        else:
            self._feel_pulse(attempt, now)
        return None

    def _feel_pulse(self, attempt: Attempt, now: float) -> None:
        """Gives *attempt* up early when its worker is cut off or stands still, if it can be done elsewhere. Raises: WorkerLost."""
        if attempt.relay.absent and self._can_move(attempt):
            raise WorkerLost
        if attempt.pace.is_stalled(now) and self._answer.delivered and self._can_move(attempt):
            raise WorkerStalled

    def _can_move(self, attempt: Attempt) -> bool:
        if self._answer.delivered:
            return self._continuing.may_move(attempt.leg, away_from=attempt.worker)
        others = self._s.router.servers(attempt.leg) - {attempt.worker}
        return bool(others) or self._trail.beside(attempt.leg) is not None

    async def _deliver(self, attempt: Attempt) -> None:
        """What *attempt* has said goes out, once it has said something. An answer in one piece waits for its end."""
        if attempt.first_token_at is None or not attempt.held or not self.books.request.stream:
            return
        if not self._answer.delivered and attempt.worker is not None:
            self._prefer(attempt)
            self._continuing.begun(attempt.leg, attempt.worker)
        self._note_spoken(attempt)
        chunks, attempt.held = attempt.held, []
        frames, attempt.frames_held = attempt.frames_held, []
        for frame in frames:
            self._continuing.delivered.add(frame)
        await self._answer.deliver(chunks)

    def _note_spoken(self, attempt: Attempt) -> None:
        """What broke off is made good."""
        if self._onward is not None and self._break is not None and attempt.first_token_at is not None:
            self._continuing.migrations += 1
            self.books.note_migrated(attempt, self._onward, broke=self._break, at=attempt.first_token_at)
            self._break = None

    async def _last_word(self, attempt: Attempt, finish_reason: str) -> Finished:
        """What *attempt*'s worker could not say any more, with its usage, if it has put that on record."""
        job, receipts, usage = attempt.job, self._s.receipts, None
        if receipts is not None and attempt.worker is not None:
            usage = await receipts.usage(job, attempt.worker)
        return self._end_of(attempt, finish_reason, usage)

    def _end_of(self, attempt: Attempt, finish_reason: str, usage: Usage | None) -> Finished:
        job = attempt.job
        frame = Finished(
            request_id=job.request_id,
            epoch=job.epoch,
            seq=0,
            finish_reason=finish_reason,
            usage=usage,
            usage_raw=NOT_TOLD if usage is None else Raw(usage_json(usage)),
        )
        return self._whole(attempt, frame)

    def _whole(self, attempt: Attempt, frame: Finished) -> Finished:
        """*frame* with the usage of the whole answer, where it had several parts."""
        if self._onward is None:
            return frame
        return self._continuing.whole(frame, self._onward, tokens=attempt.tokens)

    async def _close(self, ending: Ending) -> None:
        """Records the end, durably, and only then sends the client's last byte."""
        self.books.delivered = self._answer.delivered
        tokens = self._continuing.delivered.tokens
        told = await self.books.close(ending, began=self._answer.began, delivered_tokens=tokens)
        if self._on_unserved is not None and not self.books.served:
            await self._on_unserved()
        match told:
            case Done(frame):
                own = frame.usage is not None and frame.usage_raw != NOT_TOLD
                usage = bytes(frame.usage_raw) if own else usage_json(frame.usage or self.books.estimate())
                await self._answer.finish(frame.chunks, usage)
            case Broke(cause):
                await self._answer.fail(problem_of(cause))
            case Left():
                self._answer.cut()
            case None:
                self._answer.lose()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._leave("client_left")

    def _leave(self, reason: str) -> None:
        if self._gone is None:
            self._gone = reason
        for attempt in self._running:
            attempt.relay.leave(reason)

    def _give_up(self) -> None:
        """The client reads too slowly. We may be stuck in writing to it, so this is cut off as the total time-out is."""
        self._leave("client_too_slow")
        if not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _given_up(self) -> Ending:
        if self._gone is not None:
            return self._left(self._gone)
        attempt, finish_reason = self._running[:1], self._continuing.delivered.finish_reason
        self._stop("total_timeout")
        if attempt and finish_reason is not None:  # its client has all of it, and waits for the usage alone
            return Done(self._end_of(attempt[0], finish_reason, None))
        return Broke(TotalTimeout())

    def _left(self, reason: str) -> Left:
        for attempt in self._running:
            if attempt.relay.started_at > 0 and attempt.started_at is None:
                # It began while we were still waiting for the log; nobody has taken the frame that says so.
                self.books.note_started(attempt, at=attempt.relay.started_at)
        began = [attempt for attempt in self._running if attempt.started_at is not None]
        if began:
            self._prefer(began[0])
        self._stop(reason)
        return Left(reason)

    def _stop(self, reason: str) -> None:
        if self._running:
            self._prefer(self._running[0])
        for attempt in tuple(self._running):
            self._drop(attempt, reason)

    def _job(self, leg: Leg, onward: Onward | None) -> Job:
        books = self.books
        return Job(
            request_id=books.arrival.request_id,
            epoch=books.attempts + 1,
            ingress=self._s.ingress,
            nonce=new_nonce(),
            org=books.principal.org,
            key_id=books.principal.key_id,
            model=leg.model,
            route=leg.route,
            stream=books.request.stream,
            accepted_ns=books.arrival.ns,
            timeouts=self._waits.at(self._s.router.timeouts(leg)),
            body=Raw(self._body),
            announced=True,
            not_workers=self._trail.not_workers(leg) if onward is None else (),
            continuation=None if onward is None else onward.continuation,
        )


def _with_chunks(chunks: list[Raw], frame: Finished) -> Finished:
    """*frame* with all of *chunks*, its own among them."""
    if len(chunks) == len(frame.chunks):
        return frame
    return msgspec.structs.replace(frame, chunks=tuple(chunks))
