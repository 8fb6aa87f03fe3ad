"""One accepted request, from its job to its last byte: attempts, time-outs, the client's leaving, and the closing event."""

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
from ingress.policy.routing import Leg, Plan
from ingress.problems import CLIENT_LEFT_STATUS, fault_of, problem_of
from ingress.relay import Relay, Switchboard
from ingress.sse import usage_json
from schemas.chat import ChatRequest
from schemas.control import KeyStated
from schemas.errors import (
    BacklogFull,
    FirstTokenTimeout,
    IdleTimeout,
    LogUnavailable,
    PenstockError,
    ProviderNonsense,
    QueueTimeout,
    Stopping,
    TotalTimeout,
    WorkerLost,
)
from schemas.events import AttemptLost, AttemptStarted, RequestAccepted, RequestFinished
from schemas.frames import AnyFrame, Delta, Faulted, Finished, Started, Yielded
from schemas.ids import EventId, IngressId, RequestId, RouteId, WorkerId, new_id, new_nonce
from schemas.jobs import Cancel, Job, Timeouts
from schemas.money import Usage, cost

log = structlog.get_logger()

ATTEMPTS_MAX = 3
RECORD_WAIT_S = 30.0  # how long an answer waits for the log before it becomes an error
RECORD_FAILURE_WAIT_S = 1.0  # an error need not wait for its event: the log keeps it
PROMPT_BYTES_PER_TOKEN = 4  # for an estimate, when no provider tells


@dataclass(frozen=True, slots=True)
class Services:
    """What an exchange works with."""

    ingress: IngressId
    log: EventLog
    queue: JobQueue
    switchboard: Switchboard
    timeouts: Timeouts
    keep_alive_comment_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """When and as what a request came in. *at* is monotonic seconds; the event loop's own clock may count in milliseconds."""

    request_id: RequestId
    at: float
    ns: int  # UTC

    def since_us(self, at: float) -> int:
        return int((at - self.at) * 1e6)


@dataclass(frozen=True, slots=True)
class Done:
    """The provider finished."""

    frame: Finished


@dataclass(frozen=True, slots=True)
class Broke:
    """It ended with an error."""

    error: PenstockError


@dataclass(frozen=True, slots=True)
class Left:
    """The client didn't wait for the end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Again:
    """The attempt was lost before anything was delivered: another may be tried."""

    error: PenstockError


Ending = Done | Broke | Left


class Exchange:
    """Serves one accepted request and closes its books."""

    def __init__(
        self,
        services: Services,
        arrival: Arrival,
        request: ChatRequest,
        *,
        body: bytes,
        principal: KeyStated,
        plan: Plan,
        prompt_hash: str,
    ) -> None:
        self.attempts = 0
        self.leg: Leg = plan.legs[0]  # of the present attempt
        self.overhead_us = 0  # ours until the first chunk: all time but the provider's
        self._s = services
        self._arrival = arrival
        self._request = request
        self._body = body
        self._principal = principal
        self._plan = plan
        self._prompt_hash = prompt_hash
        self._relay: Relay | None = None
        self._accepted: asyncio.Future[None] | None = None
        self._job_seq: int | None = None
        self._worker: WorkerId | None = None
        self._started_at: float | None = None  # of the present attempt
        self._heard_at = 0.0
        self._queue_us: int | None = None
        self._first_token_us: int | None = None
        self._tokens = 0
        self._answer: Answer
        self._limit: asyncio.Timeout

    @property
    def route(self) -> RouteId:
        return self.leg.route

    @property
    def model(self) -> str:
        """The one that answers: the client's own, or a fallback that it named."""
        return self.leg.model

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
            log.exception("exchange_broke", request_id=self._arrival.request_id)
            self._stop("internal_error")
            ending = Broke(PenstockError())
        finally:
            listener.cancel()
        await self._close(ending)

    def _give_up(self) -> None:
        """The client reads too slowly. We may be stuck in writing to it, so this is cut off as the total time-out is."""
        if not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _given_up(self) -> Ending:
        if self._relay is not None and self._relay.gone is not None:
            return self._left(self._relay.gone)
        self._stop("total_timeout")
        return Broke(TotalTimeout())

    def _left(self, reason: str) -> Left:
        relay = self._relay
        if relay is not None and relay.worker is not None and relay.started_at > 0 and self._started_at is None:
            # It began while we were still waiting for the log; nobody has taken the frame that says so.
            self._note_started(relay.worker, self.attempts, relay.started_at)
        self._stop(reason)
        return Left(reason)

    @staticmethod
    def _uncancel() -> None:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()

    async def _attempts(self) -> Ending:
        while True:
            self.leg = self._plan.legs[self.attempts % len(self._plan.legs)]
            self.attempts += 1
            ending = await self._attempt(epoch=self.attempts)
            if not isinstance(ending, Again):
                return ending
            if self.attempts == ATTEMPTS_MAX:
                return Broke(ending.error)

    async def _attempt(self, epoch: int) -> Ending | Again:
        """One attempt: publish, then hand on what comes until something ends it."""
        self._worker, self._started_at, self._job_seq = None, None, None
        self._tokens, self._first_token_us = 0, None  # nothing of an earlier attempt was delivered
        self._relay = relay = self._s.switchboard.open(
            new_nonce(), on_overflow=self._give_up, on_doubt=self._queue_again
        )
        try:
            return await self._follow(relay, epoch)
        except (WorkerLost, BacklogFull) as error:
            if relay.gone is not None:
                return self._left(relay.gone)
            if isinstance(error, BacklogFull) or self._answer.delivered:
                return Broke(error)
            self._note_lost(epoch, error)
            return Again(error)
        except PenstockError as error:
            self._stop(error.code)
            return Broke(error)
        finally:
            self._s.switchboard.close(relay)

    async def _follow(self, relay: Relay, epoch: int) -> Ending:
        if self._accepted is None:
            self._accepted = self._s.log.append(self._accepted_event())
        self._job_seq = await self._s.queue.publish(self._job(relay, epoch))
        await self._s.log.durable(self._accepted, within_s=RECORD_WAIT_S)  # no byte goes out before both are on record
        self._heard_at = time.monotonic()
        comment_at = self._heard_at + self._s.keep_alive_comment_s
        while True:
            frames = await relay.take(min(self._deadline(), comment_at))
            if relay.gone is not None:
                return self._left(relay.gone)
            now = time.monotonic()
            if not frames:
                if now >= self._deadline():
                    raise self._timeout()
                if now >= comment_at:  # timers may be a millisecond early
                    await self._answer.keep_alive()
                    comment_at = now + self._s.keep_alive_comment_s
                continue
            self._heard_at = now
            comment_at = now + self._s.keep_alive_comment_s
            ending = await self._hand_on(relay, frames, epoch, now)
            if ending is not None:
                return ending

    async def _hand_on(self, relay: Relay, frames: list[AnyFrame], epoch: int, now: float) -> Ending | None:
        chunks: list[Raw] = []
        for frame in frames:
            match frame:
                case Started():
                    self._note_started(frame.worker, epoch, relay.started_at)
                case Delta():
                    self._note_chunks(frame, now)
                    chunks.extend(frame.chunks)
                case Finished():
                    self._note_chunks(frame, now)
                    if self._first_token_us is None:
                        return Broke(ProviderNonsense("The provider finished without an answer."))
                    # What came along with the end goes out with it, behind the closing event.
                    return Done(_joined(chunks, frame))
                case Faulted():
                    if chunks:
                        await self._answer.deliver(chunks)
                    return Broke(fault_of(frame))
                case Yielded():
                    if chunks:
                        await self._answer.deliver(chunks)
                    raise WorkerLost(f"The worker handed the request back ({frame.reason}).")
                case _:
                    assert_never(frame)
        if chunks:
            await self._answer.deliver(chunks)
        return None

    async def _close(self, ending: Ending) -> None:
        """Records the end, durably, and only then sends the client's last byte."""
        try:
            await self._record(ending)
        except LogUnavailable as error:
            log.error("request_not_recorded_in_time", request_id=self._arrival.request_id, error=error.message)
            if isinstance(ending, Done):
                ending = Broke(error)
        except asyncio.CancelledError:  # the process stops, and the log has the event but can't be reached
            self._uncancel()
            ending = Broke(Stopping())
        match ending:
            case Done(frame):
                told = bytes(frame.usage_raw)
                usage = usage_json(self._estimate()) if frame.usage is None else told
                await self._answer.finish(frame.chunks, usage)
            case Broke(cause):
                await self._answer.fail(problem_of(cause))
            case Left():
                self._answer.cut()

    async def _record(self, ending: Ending) -> None:
        """Raises: LogUnavailable if the event isn't durable in time."""
        match ending:
            case Done(frame):
                event = self._finished("completed", 200, usage=frame.usage or self._estimate(), frame=frame)
                within_s = RECORD_WAIT_S
            case Broke(error):
                status = 200 if self._answer.began else problem_of(error).status
                kind = "rejected" if isinstance(error, BacklogFull) else "failed"
                event = self._finished(kind, status, usage=self._spent(), code=error.code)
                within_s = RECORD_FAILURE_WAIT_S
            case Left(reason):
                event = self._finished("cancelled", CLIENT_LEFT_STATUS, usage=self._spent(left=True), code=reason)
                within_s = RECORD_WAIT_S
        await self._s.log.record(event, within_s=within_s)

    def _finished(
        self, status: str, http_status: int, *, usage: Usage, code: str | None = None, frame: Finished | None = None
    ) -> RequestFinished:
        price = self.leg.price
        return RequestFinished(
            id=EventId(new_id()),
            ts_ns=time.time_ns(),
            org=self._principal.org,
            request_id=self._arrival.request_id,
            epoch=self.attempts,
            producer=self._s.log.producer,
            key_id=self._principal.key_id,
            model=self.model,
            route=self.route,
            worker=self._worker,
            status=status,
            http_status=http_status,
            code=code,
            stream=self._request.stream,
            accepted_ns=self._arrival.ns,
            queue_us=self._queue_us,
            first_token_us=self._first_token_us,
            duration_us=self._arrival.since_us(time.monotonic()),
            usage=usage,
            estimated=usage.total_tokens > 0 and (frame is None or frame.usage is None),
            price=price,
            cost_pico=cost(usage, price),
            attempts=self.attempts,
            finish_reason=None if frame is None else frame.finish_reason,
            prompt_hash=self._prompt_hash,
        )

    def _spent(self, *, left: bool = False) -> Usage:
        """What a request that did not complete has used.

        Nothing if its work never began, or failed before it gave anything. A client that *left* pays for the prompt that a
        worker had begun, and for what was delivered.
        """
        began = self._started_at is not None if left else self._answer.delivered and self._tokens > 0
        return self._estimate() if began else Usage()

    def _estimate(self) -> Usage:
        prompt_tokens = max(1, len(self._request.messages_raw) // PROMPT_BYTES_PER_TOKEN)
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=self._tokens)

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if self._relay is not None:
            self._relay.leave("client_left")

    def _stop(self, reason: str) -> None:
        """Stops the work, wherever it is: on a worker, or still in the queue."""
        if self._relay is None:
            return
        if self._relay.worker is not None:
            self._s.switchboard.command(self._relay.worker, Cancel(nonce=self._relay.nonce, reason=reason))
        elif self._job_seq is not None:
            self._s.switchboard.spawn(self._s.queue.withdraw(self._job_seq))

    def _queue_again(self) -> None:
        """JOBS lives in memory: a NATS server that was restarted has forgotten the job. One that was not knows it by its id."""
        if self._relay is not None and self._job_seq is not None:
            self._s.switchboard.spawn(self._publish_again(self._relay, self.attempts))

    async def _publish_again(self, relay: Relay, epoch: int) -> None:
        try:
            seq = await self._s.queue.publish(self._job(relay, epoch))
        except PenstockError as error:
            log.debug("job_not_queued_again", request_id=self._arrival.request_id, error=error.message)
            return  # its time-out will tell, or the next reconnect puts it in
        if relay.closed:
            await self._s.queue.withdraw(seq)
        elif relay is self._relay:
            self._job_seq = seq

    def _deadline(self) -> float:
        timeouts = self._s.timeouts
        if self._started_at is None:
            return self._heard_at + timeouts.queue_s
        if self._first_token_us is None:
            return self._started_at + timeouts.first_token_s
        return self._heard_at + timeouts.idle_s

    def _timeout(self) -> PenstockError:
        if self._started_at is None:
            return QueueTimeout()
        return FirstTokenTimeout() if self._first_token_us is None else IdleTimeout()

    def _job(self, relay: Relay, epoch: int) -> Job:
        return Job(
            request_id=self._arrival.request_id,
            epoch=epoch,
            ingress=self._s.ingress,
            nonce=relay.nonce,
            org=self._principal.org,
            key_id=self._principal.key_id,
            model=self.model,
            route=self.route,
            stream=self._request.stream,
            accepted_ns=self._arrival.ns,
            timeouts=self._s.timeouts,
            body=Raw(self._body),
        )

    def _accepted_event(self) -> RequestAccepted:
        return RequestAccepted(
            id=EventId(new_id()),
            ts_ns=self._arrival.ns,
            org=self._principal.org,
            request_id=self._arrival.request_id,
            producer=self._s.log.producer,
            key_id=self._principal.key_id,
            model=self._request.model,
            plan=self._plan.routes,
            stream=self._request.stream,
            prompt_hash=self._prompt_hash,
            body_bytes=len(self._body),
            price=self._plan.legs[0].price,
        )

    def _note_started(self, worker: WorkerId, epoch: int, at: float) -> None:
        """*at* is when Started came: it may have waited here for the acceptance to be on record."""
        self._worker, self._started_at = worker, at
        queue_us = self._arrival.since_us(at)
        if self._queue_us is None:
            self._queue_us = queue_us
        self._s.log.note(
            AttemptStarted(
                id=EventId(new_id()),
                ts_ns=self._arrival.ns + queue_us * 1000,
                org=self._principal.org,
                request_id=self._arrival.request_id,
                epoch=epoch,
                producer=self._s.log.producer,
                route=self.route,
                worker=worker,
                queue_us=queue_us,
            )
        )

    def _note_chunks(self, frame: Delta | Finished, now: float) -> None:
        self._tokens += frame.tokens
        if self._first_token_us is None and frame.chunks:
            self._first_token_us = self._arrival.since_us(now)
            self.overhead_us = max(0, self._first_token_us - frame.wait_us)

    def _note_lost(self, epoch: int, error: PenstockError) -> None:
        self._s.log.note(
            AttemptLost(
                id=EventId(new_id()),
                ts_ns=time.time_ns(),
                org=self._principal.org,
                request_id=self._arrival.request_id,
                epoch=epoch,
                producer=self._s.log.producer,
                route=self.route,
                worker=self._worker,
                code=error.code,
            )
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
