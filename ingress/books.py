"""The books of one request: what becomes known of it, and the events that say so."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import assert_never

import structlog

from bus.log import Appended, EventLog
from ingress.attempt import Attempt
from ingress.continuing import Onward
from ingress.policy.routing import Leg, Plan
from ingress.problems import CLIENT_LEFT_STATUS, problem_of
from ingress.stopping import uncancel
from schemas.chat import ChatRequest
from schemas.control import KeyStated
from schemas.errors import BacklogFull, LogUnavailable, PenstockError, Stopping
from schemas.events import (
    HEDGE_LOST,
    AttemptLost,
    AttemptStarted,
    LeftOutLeg,
    RequestAccepted,
    RequestFinished,
    RequestRejected,
    StreamMigrated,
)
from schemas.frames import Delta, Finished
from schemas.ids import EventId, RequestId, RouteId, WorkerId, new_id
from schemas.money import Usage, cost, estimate

log = structlog.get_logger()

RECORD_WAIT_S = 30.0  # how long an answer waits for the log before it becomes an error
STARTED_WAIT_S = 0.25  # that an attempt began may wait for what follows, and share its page: one less for a request
RECORD_FAILURE_WAIT_S = 1.0  # an error need not wait for its event: the log keeps it
LAST_WORD_WAIT_S = 5.0  # how long an answer still waits for the log when the process stops


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


Ending = Done | Broke | Left


@dataclass(frozen=True, slots=True)
class Break:
    """Where an answer broke off that its client had begun to read. *heard_at* is when its last token came."""

    error: PenstockError
    route: RouteId
    worker: WorkerId | None
    heard_at: float


class Books:
    """Of one accepted request."""

    def __init__(
        self,
        log: EventLog,
        arrival: Arrival,
        request: ChatRequest,
        *,
        body_bytes: int,
        principal: KeyStated,
        plan: Plan,
        prompt_hash: str,
    ) -> None:
        self.arrival = arrival
        self.request = request
        self.principal = principal
        self.plan = plan
        self.overhead_us = 0  # ours until the first chunk: all time but the provider's
        self.tried = ""  # the attempts that came to nothing and why, for a header
        self.delivered = False  # something reached the client
        self.served = False  # it was answered or has a cost: not to be done again for the same Idempotency-Key
        self.migrations = 0
        self.carried = 0  # completion tokens that earlier attempts have delivered
        self.estimated = False  # part of the usage is, whatever the last provider reports
        self._log = log
        self._body_bytes = body_bytes
        self._prompt_hash = prompt_hash
        self._attempt: Attempt | None = None  # the present one
        self._attempts = 0
        self._accepted: asyncio.Future[None] | None = None
        self._queue_us: int | None = None
        self._first_token_at: float | None = None  # of an answer that has moved

    @property
    def attempts(self) -> int:
        """How many there were until now."""
        return self._attempts

    @property
    def leg(self) -> Leg:
        """Of the present attempt."""
        return self.plan.legs[0] if self._attempt is None else self._attempt.leg

    def open(self) -> None:
        """Appends the acceptance. Raises: LogUnavailable."""
        if self._accepted is None:
            self._accepted = self._log.append(self._accepted_event())

    async def opened(self) -> None:
        """Returns when the acceptance is durable. Raises: LogUnavailable if that takes longer than `RECORD_WAIT_S`."""
        assert self._accepted is not None  # noqa: S101 - `open` comes first
        await self._log.durable(self._accepted, within_s=RECORD_WAIT_S)

    def note_refused(self, error: PenstockError) -> None:
        """It was admitted, but another ingress knows better."""
        self._log.note(
            RequestRejected(
                id=EventId(new_id()),
                ts_ns=time.time_ns(),
                org=self.principal.org,
                request_id=self.arrival.request_id,
                producer=self._log.producer,
                key_id=self.principal.key_id,
                model=self.request.model,
                code=error.code,
                http_status=problem_of(error).status,
                stream=self.request.stream,
                body_bytes=self._body_bytes,
            )
        )

    def note_attempt(self) -> None:
        """One more attempt has begun."""
        self._attempts += 1

    def note_present(self, attempt: Attempt) -> None:
        """*attempt* is the one that counts from here on: what it used is what the client pays."""
        self._attempt = attempt

    def note_started(self, attempt: Attempt, *, at: float) -> None:
        """*at* is when Started came: it may have waited here for the acceptance to be on record."""
        attempt.note_started(at=at)
        queue_us = self.arrival.since_us(at)
        if self._queue_us is None:
            self._queue_us = queue_us
        assert attempt.worker is not None  # noqa: S101 - it said so
        self._log.note(
            AttemptStarted(
                id=EventId(new_id()),
                ts_ns=self.arrival.ns + queue_us * 1000,
                org=self.principal.org,
                request_id=self.arrival.request_id,
                epoch=attempt.epoch,
                producer=self._log.producer,
                route=attempt.route,
                worker=attempt.worker,
                queue_us=queue_us,
            ),
            within_s=STARTED_WAIT_S,
        )

    def note_chunks(self, attempt: Attempt, frame: Delta | Finished, *, now: float) -> None:
        if frame.chunks and not attempt.held and attempt.first_token_at is None:
            self.overhead_us = max(0, self.arrival.since_us(now) - frame.wait_us)
        attempt.note_chunks(frame, now=now)

    def carry(self, attempt: Attempt, tokens: int) -> None:
        """*attempt* broke off; until then its client got so many completion *tokens*, from it and from those before it."""
        self._first_token_at = self._first_token_at or attempt.first_token_at
        self.carried = tokens
        attempt.tokens = 0  # counted

    def note_migrated(self, attempt: Attempt, onward: Onward, *, broke: Break, at: float) -> None:
        """*attempt* has given its first token: the answer goes on *onward*, after *broke*."""
        self.migrations += 1
        self.estimated = self.estimated or not onward.exact
        self._log.note(
            StreamMigrated(
                id=EventId(new_id()),
                ts_ns=time.time_ns(),
                org=self.principal.org,
                request_id=self.arrival.request_id,
                epoch=attempt.epoch,
                producer=self._log.producer,
                route=attempt.route,
                worker=attempt.worker,
                from_route=broke.route,
                from_worker=broke.worker,
                reason=broke.error.code,
                how="exact" if onward.exact else "prefix",
                tokens_carried=onward.continuation.tokens,
                gap_us=max(0, int((at - broke.heard_at) * 1e6)),
            )
        )

    def note_lost(self, attempt: Attempt, error: PenstockError) -> None:
        """*attempt* came to nothing, and another goes on."""
        self._note_loss(attempt, error.code, getattr(error, "status", None))

    def note_outrun(self, attempt: Attempt) -> None:
        """Another attempt spoke before *attempt*."""
        self._note_loss(attempt, HEDGE_LOST, None)

    def _note_loss(self, attempt: Attempt, code: str, status: int | None) -> None:
        """The cost of *attempt* is ours, as far as it can be told here; but what it has delivered is its client's."""
        ours = attempt.started_at is not None and not self.carried
        usage = self._usage_of(attempt) if ours else Usage()
        self._log.note(
            AttemptLost(
                id=EventId(new_id()),
                ts_ns=time.time_ns(),
                org=self.principal.org,
                request_id=self.arrival.request_id,
                epoch=attempt.epoch,
                producer=self._log.producer,
                route=attempt.route,
                worker=attempt.worker,
                code=code,
                upstream_status=status,
                usage=usage,
                cost_pico=cost(usage, attempt.leg.price),
                tokens_carried=self.carried,
            )
        )

    async def close(self, ending: Ending, *, began: bool, delivered_tokens: int) -> Ending | None:
        """Records how the request ended, and returns what is to be told of it; *began*: its status had been sent by then.

        That is *ending* once it is durable. An error need not be: the log keeps it. A success that can't be made so in time is
        taken back, and recorded as the error that is told instead, with the *delivered_tokens* that its client has. If it can't be
        taken back either, because it is on its way, nobody knows what will be on record. Then it is None: nothing may be told.
        """
        appended: Appended | None = None
        try:
            appended = self._log.append(self._end(ending, began=began))
            await self._log.durable(appended, within_s=_patience_s(ending))
        except LogUnavailable as error:
            cause: PenstockError = error.with_traceback(None)
        except asyncio.CancelledError:  # the process stops, and the log has the event but can't be reached
            uncancel()
            cause = Stopping()
            if isinstance(ending, Done):
                await self._wait_for_last_word()
        else:
            return ending
        log.error("request_not_recorded_in_time", request_id=self.arrival.request_id, error=cause.message)
        if not isinstance(ending, Done) or (appended is not None and appended.stored):
            return ending
        if appended is None or appended.stored is False:  # fenced off: others end it
            return Broke(cause)
        if not self._log.withdraw(appended):
            return None
        return self._note_instead(Broke(cause), began=began, delivered_tokens=delivered_tokens)

    def _note_instead(self, broke: Broke, *, began: bool, delivered_tokens: int) -> Broke:
        """What is told in place of a success that nobody will hear of."""
        if self.delivered and self._attempt is not None:
            self.carry(self._attempt, delivered_tokens)
        self._log.note(self._end(broke, began=began))
        return broke

    async def _wait_for_last_word(self) -> None:
        """What is on record after all is what a process that stops tells. Once it is fenced off it waits no longer."""
        try:
            async with asyncio.timeout(LAST_WORD_WAIT_S):
                await self._log.flush()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            uncancel()

    def _end(self, ending: Ending, *, began: bool) -> RequestFinished:
        """The event that closes the request."""
        match ending:
            case Done(frame):
                event = self._finished("completed", 200, usage=frame.usage or self.estimate(), frame=frame)
            case Broke(error):
                status = 200 if began else problem_of(error).status
                nothing_done = isinstance(error, BacklogFull) and self._queue_us is None
                kind = "rejected" if nothing_done else "failed"
                event = self._finished(kind, status, usage=self._spent(), code=error.code)
            case Left(reason):
                event = self._finished("cancelled", CLIENT_LEFT_STATUS, usage=self._spent(left=True), code=reason)
            case _:
                assert_never(ending)
        self.served = isinstance(ending, Done) or event.usage.total_tokens > 0
        return event

    def estimate(self) -> Usage:
        return self._usage_of(self._attempt)

    def _usage_of(self, attempt: Attempt | None) -> Usage:
        tokens = self.carried + (0 if attempt is None else attempt.tokens)
        return estimate(prompt_bytes=len(self.request.messages_raw), completion_tokens=tokens)

    def _spent(self, *, left: bool = False) -> Usage:
        """What a request that did not complete has used.

        Nothing if its work never began, or failed before it gave anything. A client that *left* pays for the prompt that a
        worker had begun, and for what was delivered.
        """
        attempt = self._attempt
        if attempt is None:
            return Usage()
        began = attempt.started_at is not None if left else self.delivered and attempt.tokens > 0
        began = began or self.carried > 0
        return self.estimate() if began else Usage()

    def _accepted_event(self) -> RequestAccepted:
        legs = self.plan.legs
        return RequestAccepted(
            id=EventId(new_id()),
            ts_ns=self.arrival.ns,
            org=self.principal.org,
            request_id=self.arrival.request_id,
            producer=self._log.producer,
            key_id=self.principal.key_id,
            model=self.request.model,
            plan=self.plan.routes,
            stream=self.request.stream,
            prompt_hash=self._prompt_hash,
            body_bytes=self._body_bytes,
            price=legs[0].price,
            announced=True,
            prompt_bytes=len(self.request.messages_raw),
            models=tuple(leg.model for leg in legs) if {leg.model for leg in legs} != {self.request.model} else (),
            prices=tuple(leg.price for leg in legs) if any(leg.price != legs[0].price for leg in legs) else (),
            reasons=tuple(leg.why for leg in legs) if any(leg.why for leg in legs) else (),
            left_out=tuple(LeftOutLeg(route=o.route, model=o.model, why=o.why) for o in self.plan.left_out),
        )

    def _finished(
        self, status: str, http_status: int, *, usage: Usage, code: str | None = None, frame: Finished | None = None
    ) -> RequestFinished:
        attempt, leg = self._attempt, self.leg
        first_token_at = self._first_token_at or (None if attempt is None else attempt.first_token_at)
        return RequestFinished(
            id=EventId(new_id()),
            ts_ns=time.time_ns(),
            org=self.principal.org,
            request_id=self.arrival.request_id,
            epoch=0 if attempt is None else attempt.epoch,
            producer=self._log.producer,
            key_id=self.principal.key_id,
            model=leg.model,
            route=leg.route,
            worker=None if attempt is None else attempt.worker,
            status=status,
            http_status=http_status,
            code=code,
            stream=self.request.stream,
            accepted_ns=self.arrival.ns,
            queue_us=self._queue_us,
            first_token_us=None if first_token_at is None else self.arrival.since_us(first_token_at),
            duration_us=self.arrival.since_us(time.monotonic()),
            usage=usage,
            estimated=usage.total_tokens > 0 and (frame is None or frame.usage is None or self.estimated),
            price=leg.price,
            cost_pico=cost(usage, leg.price),
            attempts=self._attempts,
            migrations=self.migrations,
            finish_reason=None if frame is None else frame.finish_reason,
            prompt_hash=self._prompt_hash,
        )


def _patience_s(ending: Ending) -> float:
    """For how long *ending* waits to be durable."""
    return RECORD_FAILURE_WAIT_S if isinstance(ending, Broke) else RECORD_WAIT_S
