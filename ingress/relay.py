"""Frames to an ordered stream: gaps asked for again, duplicates and strangers dropped, bounded for slow readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import structlog

from bus.connection import BusUnavailable, Connection, Message
from schemas import codec, subjects
from schemas.errors import FrameGap, PenstockError, WorkerLost
from schemas.frames import AnyFrame, Delta, Started
from schemas.ids import IngressId, Nonce, WorkerId
from schemas.jobs import Cancel, Resend, Take

log = structlog.get_logger()

OUT_OF_ORDER_MAX = 1024  # frames held while an earlier one is missing
GAP_TIMEOUT_S = 2.0
RESEND_EVERY_S = 0.2


class Relay:
    """The frames of one attempt, in order and without gaps, for one reader.

    It also carries what else can happen to that reader: its client leaves (`leave`), its worker is lost (`fail`).
    *on_overflow* is called when more waits than the reader's client takes: the reader may be stuck in writing to it. *on_doubt* is
    called when the connection was away and no worker has begun yet: the job may be lost.
    """

    def __init__(
        self,
        nonce: Nonce,
        switchboard: Switchboard,
        *,
        max_bytes: int,
        on_overflow: Callable[[], None] | None = None,
        on_doubt: Callable[[], None] | None = None,
    ) -> None:
        self.nonce = nonce
        self.worker: WorkerId | None = None  # the first that spoke under this nonce
        self.started_at = 0.0  # when Started came, by the loop's clock
        self.gone: str | None = None  # why nobody reads any more
        self.absent = False  # its worker's connection is gone; perhaps it comes back
        self.closed = False
        self._switchboard = switchboard
        self._loop = asyncio.get_running_loop()
        self._frames: list[AnyFrame] = []
        self._bytes = 0
        self._max_bytes = max_bytes
        self._on_overflow = on_overflow
        self._on_doubt = on_doubt
        self._expected = 0
        self._held: dict[int, tuple[AnyFrame, int]] = {}
        self._held_bytes = 0
        self._gap_since = 0.0
        self._mender: asyncio.TimerHandle | None = None  # runs while frames are held
        self._error: PenstockError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self, until: float) -> list[AnyFrame]:
        """`poll`, once there is something; none when *until* (monotonic seconds) comes first, or when the reader has gone."""
        await heard([self], until)
        return self.poll()

    def poll(self) -> list[AnyFrame]:
        """All frames that wait.

        Raises: WorkerLost or FrameGap, after the frames that came before.
        """
        if self._error is not None and not self._frames and self.gone is None:
            raise self._error
        frames, self._frames, self._bytes = self._frames, [], 0
        return frames

    @property
    def has_news(self) -> bool:
        return bool(self._frames) or self._error is not None or self.gone is not None

    def wakes(self, waiter: asyncio.Future[None] | None) -> None:
        """*waiter* is resolved by the next news, until another one takes its place."""
        self._waiter = waiter

    def rouse(self) -> None:
        """Wakes the reader, without news: something around it has changed."""
        self._wake()

    def feed(self, frame: AnyFrame, size: int, *, worker: WorkerId) -> bool:
        """Takes a frame of *size* bytes. False if it is not *worker*'s attempt: another one has the same job.

        That happens when the acknowledgement of a delivery is lost: the queue delivers the job once more.
        """
        if self.worker is None:
            self.belong(worker)
        elif self.worker != worker:
            return False
        self.absent = False
        if frame.seq < self._expected:
            return True  # sent again, and here already
        if frame.seq > self._expected:
            self._hold(frame, size)
            return True
        self._accept(frame, size)
        while self._held and (held := self._held.pop(self._expected, None)) is not None:
            self._held_bytes -= held[1]
            self._accept(*held)
        if self._mender is not None:
            self._gap_since = self._loop.time()
        self._wake()
        return True

    def belong(self, worker: WorkerId) -> None:
        """*worker* has the attempt: nobody else is listened to."""
        self.worker = worker
        self._switchboard.note_owner(self)

    def miss(self) -> None:
        """The worker's connection is gone: its reader may look elsewhere, or wait for it to come back."""
        if not self.absent:
            self.absent = True
            self._wake()

    def leave(self, reason: str) -> None:
        """The reader's client has gone, or can't keep up."""
        if self.gone is None:
            self.gone = reason
            self._frames, self._bytes = [], 0
            self._wake()

    def fail(self, error: PenstockError) -> None:
        if self._error is None:
            self._error = error
            self._wake()

    def ask_again(self) -> None:
        """Asks the worker for everything from the first missing frame on; as long as none has come, has the job looked after."""
        if self._expected == 0 and not self._held and self._on_doubt is not None:
            self._on_doubt()
        if self.worker is not None:
            self._switchboard.command(self.worker, Resend(nonce=self.nonce, seq=self._expected))

    def close(self) -> None:
        """Nobody will read any more."""
        self.closed = True
        if self._mender is not None:
            self._mender.cancel()
            self._mender = None
        self._held.clear()
        # They lead back to whoever holds this: a cycle, and all of a request would stay until the collector comes.
        self._on_overflow = self._on_doubt = None

    def _accept(self, frame: AnyFrame, size: int) -> None:
        if isinstance(frame, Started):
            self.started_at = time.monotonic()
        self._expected += 1
        if self.gone is not None:
            return
        if self._bytes > self._max_bytes:  # and not with this frame: a big one alone says nothing of its reader
            self.leave("client_too_slow")
            if self._on_overflow is not None:
                self._on_overflow()
            return
        self._bytes += size
        self._frames.append(frame)

    def _hold(self, frame: AnyFrame, size: int) -> None:
        if frame.seq in self._held:
            return
        if len(self._held) >= OUT_OF_ORDER_MAX or self._held_bytes + size > self._max_bytes:
            self.fail(FrameGap())
            return
        self._held[frame.seq] = (frame, size)
        self._held_bytes += size
        if self._mender is None:
            self._gap_since = self._loop.time()
            self._mend()

    def _mend(self) -> None:
        """Asks for the missing frame, and again, and gives up when nothing has come for `GAP_TIMEOUT_S`."""
        self._mender = None
        if not self._held or self.gone is not None or self._error is not None:
            return
        if self._loop.time() - self._gap_since > GAP_TIMEOUT_S:
            self.fail(FrameGap())
            return
        self.ask_again()
        self._mender = self._loop.call_later(RESEND_EVERY_S, self._mend)

    def _wake(self) -> None:
        if self._waiter is not None:
            _resolve(self._waiter)


async def heard(relays: Sequence[Relay], until: float) -> None:
    """Returns when there is news in one of *relays*, or at *until* (monotonic seconds)."""
    for relay in relays:
        if relay.has_news:
            return
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    timer = loop.call_later(max(0.0, until - time.monotonic()), _resolve, waiter)
    for relay in relays:
        relay.wakes(waiter)
    try:
        await waiter
    finally:
        timer.cancel()
        for relay in relays:
            relay.wakes(None)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Switchboard:
    """One subscription for all attempts of this ingress; hands each frame to the relay with its nonce."""

    def __init__(self, connection: Connection, *, ingress: IngressId, max_bytes_per_relay: int) -> None:
        self._connection = connection
        self._ingress = ingress
        self._max_bytes = max_bytes_per_relay
        self._loop = asyncio.get_running_loop()
        self._relays: dict[Nonce, Relay] = {}
        self._of_worker: dict[WorkerId, set[Relay]] = {}
        self._heard_at: dict[WorkerId, float] = {}  # of those in `_of_worker`, by the loop's clock
        self._sending: set[asyncio.Task[object]] = set()

    def __len__(self) -> int:
        return len(self._relays)

    @property
    def is_up(self) -> bool:
        """Whether what is said now can be heard."""
        return self._connection.is_up

    async def start(self) -> None:
        await self._connection.hear(subjects.frames_filter(self._ingress), self._on_frame)
        self._connection.on_reconnect(self._on_reconnect)

    def open(
        self,
        nonce: Nonce,
        *,
        on_overflow: Callable[[], None] | None = None,
        on_doubt: Callable[[], None] | None = None,
    ) -> Relay:
        relay = Relay(nonce, self, max_bytes=self._max_bytes, on_overflow=on_overflow, on_doubt=on_doubt)
        self._relays[nonce] = relay
        return relay

    def close(self, relay: Relay) -> None:
        """From here on the nonce is unknown, and whoever still speaks under it is told to stop."""
        self._relays.pop(relay.nonce, None)
        if relay.worker is not None:
            of_worker = self._of_worker.get(relay.worker, set())
            of_worker.discard(relay)
            if not of_worker:
                self._of_worker.pop(relay.worker, None)
                self._heard_at.pop(relay.worker, None)
        relay.close()

    def note_owner(self, relay: Relay) -> None:
        """*relay* has found its worker."""
        if relay.worker is not None:
            self._of_worker.setdefault(relay.worker, set()).add(relay)
            self._heard_at.setdefault(relay.worker, self._loop.time())

    def owing(self) -> list[tuple[WorkerId, float]]:
        """The workers whose frames are waited for, and when each was heard last, by the loop's clock."""
        return list(self._heard_at.items())

    def miss(self, worker: WorkerId) -> None:
        """*worker*'s connection is gone."""
        for relay in self._of_worker.get(worker, ()):
            relay.miss()

    def lose(self, worker: WorkerId) -> None:
        """*worker* is gone: what it was doing ends with an error."""
        for relay in self._of_worker.get(worker, ()):
            relay.fail(WorkerLost())

    def rouse_waiting(self) -> None:
        """Those whose job nobody has taken yet may want to look elsewhere: other routes are served now than before."""
        for relay in self._relays.values():
            if relay.worker is None:
                relay.rouse()

    def command(self, worker: WorkerId, command: Cancel | Resend | Take) -> None:
        """Sends *command* to *worker*, without waiting. One that NATS wouldn't take is dropped: it would cost the connection."""
        self.spawn(self._command(worker, command))

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Runs *work* on the side; what it must not do is fail."""
        task = asyncio.create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _command(self, worker: WorkerId, command: Cancel | Resend | Take) -> None:
        encoded = codec.encode(command)
        if isinstance(command, Take) and len(encoded) > self._connection.max_payload:
            log.warning("command_too_large", command=type(command).__name__, bytes=len(encoded))
            return
        try:
            await self._connection.say(subjects.ctl(worker), encoded)
        except BusUnavailable as error:
            log.warning("command_not_sent", command=type(command).__name__, error=error.message)

    def _on_frame(self, msg: Message) -> None:
        worker, nonce = subjects.frame_address(msg.subject)
        relay = self._relays.get(nonce)
        try:
            frame = codec.decode_frame(msg.data)
        except msgspec.MsgspecError:
            log.warning("frame_unreadable", worker=worker)
            if relay is not None:
                relay.fail(FrameGap())
            return
        wanted = relay is not None and relay.feed(frame, len(msg.data), worker=worker)
        if worker in self._heard_at:
            self._heard_at[worker] = self._loop.time()
        if not wanted and isinstance(frame, Started | Delta):
            # Nobody listens: a client that left before its job was taken, an attempt that was given up, or a second one.
            self.command(worker, Cancel(nonce=nonce, reason="not_wanted"))

    async def _on_reconnect(self) -> None:
        """Frames may have passed while the connection was away; the last one of an attempt would never be missed."""
        for relay in list(self._relays.values()):
            relay.ask_again()
