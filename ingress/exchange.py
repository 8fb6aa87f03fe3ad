"""One accepted request, from its job to its last byte: its attempts, the client's leaving, and the end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import assert_never

import structlog
from msgspec import Raw
from starlette.types import Receive

from bus.log import EventLog
from bus.queue import JobQueue
from ingress.answer import Answer
from ingress.attempt import Attempt
from ingress.books import Books, Broke, Done, Ending, Left
from ingress.policy.routing import Leg
from ingress.problems import fault_of, problem_of
from ingress.relay import Switchboard
from ingress.router import Router
from ingress.sse import usage_json
from schemas.errors import (
    LogUnavailable,
    PenstockError,
    ProviderNonsense,
    Stopping,
    TotalTimeout,
    WorkerLost,
)
from schemas.frames import AnyFrame, Delta, Faulted, Finished, Started, Yielded
from schemas.ids import IngressId, new_nonce
from schemas.jobs import Job, Timeouts

log = structlog.get_logger()

ATTEMPTS_MAX = 3


@dataclass(frozen=True, slots=True)
class Services:
    """What an exchange works with."""

    ingress: IngressId
    log: EventLog
    queue: JobQueue
    switchboard: Switchboard
    router: Router
    timeouts: Timeouts
    keep_alive_comment_s: float


class Exchange:
    """Serves one accepted request and closes its books."""

    def __init__(self, services: Services, books: Books, *, body: bytes) -> None:
        self.books = books
        self._s = services
        self._body = body
        self._attempt: Attempt | None = None  # the present one
        self._answer: Answer
        self._limit: asyncio.Timeout

    async def run(self, answer: Answer, receive: Receive) -> None:
        """Serves the request on *answer*. Watches *receive* for the client's leaving all the while."""
        self._answer = answer
        listener = asyncio.create_task(self._listen(receive))
        try:
            async with asyncio.timeout(self._s.timeouts.total_s) as self._limit:
                ending = await self._attempts()
        except TimeoutError:
            ending = self._given_up()
        except asyncio.CancelledError:
            # The process stops and will wait no longer: the books are closed all the same.
            self._stop("ingress_stopping")
            self._uncancel()
            await self._close(Broke(Stopping()))
            return
        except Exception:
            log.exception("exchange_broke", request_id=self.books.arrival.request_id)
            self._stop("internal_error")
            ending = Broke(PenstockError())
        finally:
            listener.cancel()
        await self._close(ending)

    async def _attempts(self) -> Ending:
        """One attempt after the other, until one ends the request."""
        error: PenstockError
        while True:
            attempt = self._begin()
            try:
                return await self._follow(attempt)
            except PenstockError as broke:
                error = broke
                attempt.trip.failed(broke)
            finally:
                attempt.close()
            if attempt.relay.gone is not None:
                return self._left(attempt, attempt.relay.gone)
            if not self._goes_on(attempt, error):
                return Broke(error)
            self.books.note_lost(attempt, error)

    def _begin(self) -> Attempt:
        legs = self.books.plan.legs
        leg = legs[self.books.attempts % len(legs)]
        self._attempt = attempt = Attempt(
            self._job(leg),
            self._s.router.begin(leg, stream=self.books.request.stream),
            queue=self._s.queue,
            switchboard=self._s.switchboard,
            on_overflow=self._give_up,
        )
        self.books.note_attempt(attempt)
        return attempt

    def _goes_on(self, attempt: Attempt, error: PenstockError) -> bool:
        """Whether another attempt is made after *attempt* ended with *error*. If not, its work is stopped.

        What has reached the client can't be taken back: from then on only a continuation could help.
        """
        if not isinstance(error, WorkerLost):
            attempt.stop(error.code)
            return False
        return not self._answer.delivered and self.books.attempts < ATTEMPTS_MAX

    async def _follow(self, attempt: Attempt) -> Ending:
        """Publishes *attempt* and hands on what comes until something ends it. Raises: PenstockError."""
        self.books.open()
        await attempt.publish()
        await self.books.opened()  # no byte goes out before both are on record
        attempt.heard_at = time.monotonic()
        comment_at = attempt.heard_at + self._s.keep_alive_comment_s
        while True:
            frames = await attempt.take(comment_at)
            if attempt.relay.gone is not None:
                return self._left(attempt, attempt.relay.gone)
            now = time.monotonic()
            if frames:
                ending = await self._hand_on(attempt, frames, now)
                if ending is not None:
                    return ending
            elif now >= comment_at:  # timers may be a millisecond early
                await self._answer.keep_alive()
            else:
                continue
            comment_at = now + self._s.keep_alive_comment_s

    async def _hand_on(self, attempt: Attempt, frames: list[AnyFrame], now: float) -> Ending | None:
        """Delivers what *frames* hold. Raises: PenstockError that the last one tells of."""
        chunks: list[Raw] = []
        for frame in frames:
            match frame:
                case Started():
                    self.books.note_started(attempt, at=attempt.relay.started_at)
                case Delta():
                    self.books.note_chunks(attempt, frame, now=now)
                    chunks.extend(frame.chunks)
                case Finished():
                    self.books.note_chunks(attempt, frame, now=now)
                    if attempt.first_token_at is None:
                        raise ProviderNonsense("The provider finished without an answer.")
                    # What came along with the end goes out with it, behind the closing event.
                    return Done(_joined(chunks, frame))
                case Faulted():
                    await self._deliver(chunks)
                    raise fault_of(frame)
                case Yielded():
                    await self._deliver(chunks)
                    raise WorkerLost(f"The worker handed the request back ({frame.reason}).")
                case _:
                    assert_never(frame)
        await self._deliver(chunks)
        return None

    async def _deliver(self, chunks: list[Raw]) -> None:
        if chunks:
            await self._answer.deliver(chunks)

    async def _close(self, ending: Ending) -> None:
        """Records the end, durably, and only then sends the client's last byte."""
        self.books.delivered = self._answer.delivered
        try:
            await self.books.close(ending, began=self._answer.began)
        except LogUnavailable as error:
            log.error("request_not_recorded_in_time", request_id=self.books.arrival.request_id, error=error.message)
            if isinstance(ending, Done):
                ending = Broke(error)
        except asyncio.CancelledError:  # the process stops, and the log has the event but can't be reached
            self._uncancel()
            ending = Broke(Stopping())
        match ending:
            case Done(frame):
                told = bytes(frame.usage_raw)
                usage = usage_json(self.books.estimate()) if frame.usage is None else told
                await self._answer.finish(frame.chunks, usage)
            case Broke(cause):
                await self._answer.fail(problem_of(cause))
            case Left():
                self._answer.cut()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if self._attempt is not None:
            self._attempt.relay.leave("client_left")

    def _give_up(self) -> None:
        """The client reads too slowly. We may be stuck in writing to it, so this is cut off as the total time-out is."""
        if not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _given_up(self) -> Ending:
        if self._attempt is not None and self._attempt.relay.gone is not None:
            return self._left(self._attempt, self._attempt.relay.gone)
        self._stop("total_timeout")
        return Broke(TotalTimeout())

    def _left(self, attempt: Attempt, reason: str) -> Left:
        if attempt.worker is not None and attempt.relay.started_at > 0 and attempt.started_at is None:
            # It began while we were still waiting for the log; nobody has taken the frame that says so.
            self.books.note_started(attempt, at=attempt.relay.started_at)
        attempt.stop(reason)
        return Left(reason)

    def _stop(self, reason: str) -> None:
        if self._attempt is not None:
            self._attempt.stop(reason)

    @staticmethod
    def _uncancel() -> None:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()

    def _job(self, leg: Leg) -> Job:
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
            timeouts=self._s.timeouts,
            body=Raw(self._body),
            announced=True,
        )


def _joined(chunks: list[Raw], frame: Finished) -> Finished:
    if not chunks:
        return frame
    return Finished(
        request_id=frame.request_id,
        epoch=frame.epoch,
        seq=frame.seq,
        chunks=(*chunks, *frame.chunks),
        usage=frame.usage,
        usage_raw=frame.usage_raw,
        finish_reason=frame.finish_reason,
    )
