"""One attempt at a request, as its ingress sees it: its job in the queue or at a worker, what comes of it, and in what time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog
from msgspec import Raw

from bus.queue import JobQueue
from ingress.overdue import Overdue
from ingress.pace import Pace
from ingress.policy.drain import Drain, Place
from ingress.relay import Switchboard
from ingress.speech import says_something
from ingress.trip import Trip
from schemas.errors import BacklogFull, FirstTokenTimeout, IdleTimeout, PenstockError, QueueTimeout, TotalTimeout
from schemas.events import BEGUN_ELSEWHERE
from schemas.frames import AnyFrame, Delta, Finished, LastFrame
from schemas.ids import RouteId, WorkerId
from schemas.jobs import Cancel, Job, Take

log = structlog.get_logger()

TAKE_WAIT_S = 1.0  # a worker that is asked to go on with an answer says at once whether it does
TAKE_AGAIN_S = 0.3  # it may have been lost with a connection, and nothing would tell: it is asked again
TAKE_AGAIN_FACTOR = 4  # each further time
TAKES_MAX = 4  # times that one worker is asked
WAIT_MIN_S = 0.001
HELD_MAX = 64  # chunks without content that are held back until some comes


class _Asked(NamedTuple):
    """How often a worker was asked to begin, and when it is asked again (monotonic seconds)."""

    times: int
    again_at: float


_NOT_ASKED = _Asked(0, 0.0)


class Attempt:
    """From the publishing of *job* for its *trip* to the last frame that is taken; whoever makes one closes it.

    Times are monotonic seconds. *on_overflow* is called when its client takes less than comes.
    """

    def __init__(
        self,
        job: Job,
        trip: Trip,
        *,
        queue: JobQueue,
        switchboard: Switchboard,
        drain: Drain,
        on_overflow: Callable[[], None],
        to: tuple[WorkerId, ...] = (),
        until: float | None = None,
        overdue: Overdue | None = None,
    ) -> None:
        """With *to* it goes to that worker and not into the queue; with *until*, to all of these, and waits for a slot until then.

        In the queue it is looked after by *overdue*.
        """
        self.job = job
        self.trip = trip
        self.leg = trip.leg
        self.relay = switchboard.open(job.nonce, on_overflow=on_overflow, on_doubt=self._say_again)
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.heard_at = time.monotonic()
        self._ends_at = self.heard_at + job.timeouts.total_s
        self.held: list[Raw] = []  # chunks that have come and not gone out yet
        self.frames_held: list[Delta | Finished] = []  # that they came in
        self.pace = Pace()
        self.tokens = 0  # completion tokens in what came, as the worker counts them
        self._queue = queue
        self._switchboard = switchboard
        self._drain = drain
        self._job_seq: int | None = None
        self._waiting = False
        self._over = False  # its last frame was taken
        self._to = to
        self._until = until
        self.asked: set[WorkerId] = set()  # besides the queue; whoever begins first has it
        self._takes: dict[WorkerId, _Asked] = {}  # who may have to be asked again
        self._overdue = overdue
        if to and until is None:
            self.relay.belong(to[0])

    @property
    def epoch(self) -> int:
        return self.job.epoch

    @property
    def route(self) -> RouteId:
        return self.leg.route

    @property
    def worker(self) -> WorkerId | None:
        """Who speaks in it."""
        return self.relay.worker

    async def publish(self) -> None:
        """Raises: BacklogFull, BadRequest, QueueUnavailable."""
        if self._until is not None:
            self.ask(self._to)
            return
        if self._to:
            self._take(self._to[0], time.monotonic())
            return
        try:
            self._job_seq = await self._queue.publish(self.job)
        except BacklogFull as error:
            error.retry_after_s = self._drain.retry_after_s(self.place, now=time.monotonic())
            raise
        self._waiting = True
        self._drain.waits(self.place, now=time.monotonic())
        if self._overdue is not None:
            self._overdue.waits(self)

    def ask(self, workers: Iterable[WorkerId]) -> None:
        """Any of *workers* may begin it: now if it has a slot; one that goes on with an answer also later."""
        now = time.monotonic()
        for worker in workers:
            self.asked.add(worker)
            self._take(worker, now)

    def _take(self, worker: WorkerId, now: float) -> None:
        waits = self._to == () or self._until is not None
        wait_s = max(WAIT_MIN_S, self.deadline - now) if waits else 0.0
        self._switchboard.command(worker, Take(job=self.job, wait_s=wait_s))
        if self._to:  # what is in the queue, too, has somebody who looks after it
            before = self._takes.get(worker, _NOT_ASKED)
            self._takes[worker] = _Asked(before.times + 1, now + TAKE_AGAIN_S * TAKE_AGAIN_FACTOR**before.times)

    def _ask_again(self, now: float) -> None:
        """Whoever was asked and has said nothing may not have heard of it."""
        for worker, asked in tuple(self._takes.items()):
            if now < asked.again_at:
                continue
            if asked.times < TAKES_MAX:
                self._take(worker, now)
            else:
                self._takes[worker] = asked._replace(again_at=math.inf)

    def note_started(self, *, at: float) -> None:
        self.started_at = at
        self._takes.clear()
        if self._waiting:
            self._waiting = False
            self._drain.began(self.place, now=at)
        self._no_longer_overdue()
        if self.asked:
            self._recall(BEGUN_ELSEWHERE)
            if self._job_seq is not None:
                self._switchboard.spawn(self._queue.withdraw(self._job_seq))

    @property
    def place(self) -> Place:
        """Where its job waits."""
        return self.leg.route, self.leg.model, self.job.org

    def poll(self, now: float) -> list[AnyFrame]:
        """The frames that wait; none if nothing does, or when the client has gone: then ``relay.gone`` says why.

        Raises: WorkerLost or FrameGap after the frames that came before; QueueTimeout, FirstTokenTimeout, IdleTimeout or
        TotalTimeout.
        """
        frames = self.relay.poll()
        if frames:
            self.heard_at = now
            self._over = isinstance(frames[-1], LastFrame)
        elif self.relay.gone is None and now >= self.deadline:
            if not self._is_unheard():
                raise self._timeout()
            self.heard_at = now
        else:
            self._ask_again(now)
        return frames

    def _is_unheard(self) -> bool:
        """Whether nobody can have heard whom it was given to: our own connection is away. It is asked anew when that is back."""
        return self.started_at is None and self._to != () and self._until is None and not self._switchboard.is_up

    def note_chunks(self, frame: Delta | Finished, *, now: float) -> None:
        """Holds the chunks of *frame*: they may go to the client once the attempt has spoken."""
        self.tokens += frame.tokens
        self.held.extend(frame.chunks)
        self.frames_held.append(frame)
        self.pace.heard(now)
        if self.first_token_at is None and self._speaks(frame):
            self.first_token_at = now
            self.trip.spoke()

    def _speaks(self, frame: Delta | Finished) -> bool:
        """Whether there is content by now, or no reason to wait for it any longer."""
        if isinstance(frame, Finished) or len(self.held) > HELD_MAX:
            return bool(self.held)
        return frame.tokens > 0 or any(map(says_something, frame.chunks))

    @property
    def look_at(self) -> float:
        """When there is something to do if nothing comes."""
        soonest = min(self.deadline, self.pace.look_at)
        return min(soonest, *(asked.again_at for asked in self._takes.values())) if self._takes else soonest

    @property
    def deadline(self) -> float:
        """When it is given up if nothing comes."""
        return min(self._next_by(), self._ends_at)

    def _next_by(self) -> float:
        timeouts = self.job.timeouts
        if self.started_at is None:
            return self._until or self.heard_at + (TAKE_WAIT_S if self._to else timeouts.queue_s)
        if self.first_token_at is None:
            return self.started_at + timeouts.first_token_s
        return self.heard_at + timeouts.idle_s

    def stop(self, reason: str) -> None:
        """Stops the work, wherever it is: on a worker, or still in the queue."""
        if self._over:
            return
        if self.worker is not None:
            self._switchboard.command(self.worker, Cancel(nonce=self.relay.nonce, reason=reason))
        elif self._job_seq is not None:
            self._switchboard.spawn(self._queue.withdraw(self._job_seq))
        self._recall(reason)

    def _recall(self, reason: str) -> None:
        """Whoever was asked and has not begun needn't any more."""
        for worker in self.asked - {self.worker}:
            self._switchboard.command(worker, Cancel(nonce=self.relay.nonce, reason=reason))
        self.asked.clear()
        self._takes.clear()

    def close(self) -> None:
        """Nobody will read any more of it."""
        self._switchboard.close(self.relay)
        if self._waiting:
            self._waiting = False
            self._drain.left(self.place)
        self._no_longer_overdue()
        self.trip.ended(self.tokens)

    def _no_longer_overdue(self) -> None:
        if self._overdue is not None:
            self._overdue.left(self)

    @property
    def waited_in_vain(self) -> bool:
        """Whether it has waited for a slot as long as it may."""
        return self._until is not None and self.started_at is None and time.monotonic() >= self._until

    def _timeout(self) -> PenstockError:
        if self._ends_at < self._next_by():
            return TotalTimeout()
        if self.started_at is None:
            timeouts = self.job.timeouts
            stalled = self._until is not None and timeouts.idle_s < timeouts.queue_s
            return IdleTimeout() if stalled else QueueTimeout()
        return FirstTokenTimeout() if self.first_token_at is None else IdleTimeout()

    def _say_again(self) -> None:
        """The connection was away: whoever was asked may not have heard of it.

        And JOBS lives in memory: a NATS server that was restarted has forgotten the job. One that was not knows it by its id.
        """
        if self._takes:
            self.heard_at = time.monotonic()
            self._takes = dict.fromkeys(self._takes, _NOT_ASKED)
            self._ask_again(self.heard_at)
        if self._job_seq is not None and self.worker is None:
            self._switchboard.spawn(self._publish_again())

    async def _publish_again(self) -> None:
        try:
            seq = await self._queue.publish(self.job)
        except PenstockError as error:
            log.debug("job_not_queued_again", request_id=self.job.request_id, error=error.message)
            return  # its time-out will tell, or the next reconnect puts it in
        if self.relay.closed:
            await self._queue.withdraw(seq)
        else:
            self._job_seq = seq
