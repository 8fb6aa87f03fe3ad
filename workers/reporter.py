"""Frames on their way to the ingress: numbered without gaps, coalesced under load, kept for a resend.

A chunk is not held back, but for a first one without a token: it goes out in the event loop's next turn. What has come
together by then, because the provider sent several at once or this process is busy, goes out as one frame; so the busier the
worker, the fewer the frames.

A frame that NATS wouldn't take would never arrive, however often it was asked for. So frames are bounded in bytes, and a single
chunk that can't be carried is the provider's fault and ends the attempt.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator

import structlog
from msgspec import Raw

from bus.connection import BusUnavailable, Connection
from schemas import codec, subjects
from schemas.errors import ProviderNonsense
from schemas.events import INGRESS_LOST
from schemas.frames import NOT_TOLD, AnyFrame, Delta, Faulted, Finished, LastFrame, Started, Yielded
from schemas.ids import Nonce, WorkerId
from schemas.jobs import Cancelled, Completed, Failed, HandedBack, Job, Outcome
from workers.providers.base import Chunk

log = structlog.get_logger()

CHUNKS_PER_FRAME_MAX = 256
FRAME_CHUNKS_BYTES_MAX = 1024 * 1024  # of the chunks that share a frame; a larger one has a frame of its own
ENVELOPE_MAX_BYTES = 512 * 1024  # what a frame has besides its chunks; most of it room for the prompt's token ids
PROMPT_IDS_MAX = 48 * 1024  # a longer prompt is not carried, and its answer not continued exactly
USAGE_MAX_BYTES = 16 * 1024
KEPT_REPORTS_MAX = 2048  # finished attempts whose frames can still be asked for
KEPT_REPORTS_MAX_BYTES = 64 * 1024 * 1024
KEPT_FOR_S = 2.0
ORPHAN_KEPT_FOR_S = 60.0  # an ingress that is taken for gone and comes back finds out how its attempts ended


class Reporter:
    """The frames of one attempt."""

    def __init__(self, job: Job, outbox: Outbox, *, worker: WorkerId, max_kept_bytes: int) -> None:
        self.tokens = 0  # completion tokens in what was reported, as the provider counts them
        self._job = job
        self._outbox = outbox
        self._worker = worker
        self._subject = subjects.frames(worker, job.ingress, job.nonce)
        self._seq = 0
        self._chunks: list[Raw] = []
        self._tokens = 0
        self._wait_us = 0
        self._begun = False
        self._token_ids: list[int] = []
        self._prompt_token_ids: tuple[int, ...] = ()
        self._usage_raw: bytes | None = None
        self._last: Outcome | None = None
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._max_kept_bytes = max_kept_bytes

    @property
    def nonce(self) -> Nonce:
        return self._job.nonce

    @property
    def size(self) -> int:
        """Bytes that are kept, or will be once they are sent."""
        return self._kept_bytes + sum(memoryview(chunk).nbytes for chunk in self._chunks)

    def started(self) -> None:
        job = self._job
        frame = Started(request_id=job.request_id, epoch=job.epoch, seq=self._seq, worker=self._worker)
        self._outbox.put(self._subject, self._keep(frame))

    def chunk(self, chunk: Chunk, *, wait_us: int = 0) -> None:
        """Takes a piece of the answer; *wait_us* is how long the provider took, on the first.

        Raises: ProviderNonsense if it is larger than can be carried.
        """
        pieces = chunk.pieces
        if pieces and max(map(len, pieces)) > self._outbox.frame_max_bytes - ENVELOPE_MAX_BYTES:
            raise ProviderNonsense("The provider sent more at once than can be carried.")
        if len(chunk.usage_raw or b"") > USAGE_MAX_BYTES:
            raise ProviderNonsense("The provider's usage is too long.")
        if chunk.usage_raw is not None:
            self._usage_raw = chunk.usage_raw
        if wait_us:
            self._wait_us = wait_us
        if pieces:
            self._chunks += map(Raw, pieces)
            self._tokens += chunk.tokens
            self.tokens += chunk.tokens
            self._token_ids += chunk.token_ids
            if chunk.prompt_token_ids and len(chunk.prompt_token_ids) <= PROMPT_IDS_MAX:
                self._prompt_token_ids = chunk.prompt_token_ids
            self._say(chunk)

    def _say(self, chunk: Chunk) -> None:
        """Most servers begin with a chunk that has but the role, right before the first token: it goes along with that."""
        opens, self._begun = not self._begun, True
        if opens and chunk.tokens == 0:
            return
        if self.tokens == chunk.tokens and chunk.finish_reason is None and self._outbox.hurry(self):
            return  # the first token of several
        if self._outbox.wants(self):
            self._outbox.mark(self)

    def ended(self, outcome: Outcome) -> None:
        """Says how the attempt ended. A cancelled one says nothing where nobody listens any more."""
        self._last = outcome
        self._outbox.mark(self)

    def repeat_last(self) -> None:
        """Sends the last frame again: whoever misses one before it sees that, and asks for it."""
        self.resend(self._seq - 1)

    def broke(self) -> None:
        """Ends the attempt with an error, for a report that can't be written."""
        self._chunks.clear()
        self._usage_raw = None
        self.ended(Failed(fault=ProviderNonsense("The provider's answer can't be written down.")))

    def resend(self, from_seq: int) -> None:
        for seq, frame in self._kept.items():
            if seq >= from_seq:
                self._outbox.put(self._subject, frame)

    def take(self) -> list[tuple[str, bytes]]:
        """The frames that are due now, encoded."""
        frames: list[bytes] = []
        while self._chunks:
            chunks, rest = _frameful(self._chunks)
            if not rest and isinstance(self._last, Completed):
                break  # they go with the last frame
            frames.append(self._keep(self._delta(chunks)))
            self._chunks = rest
        if self._last is not None:
            last = self._last_frame(self._last)
            self._last = None
            if last is not None:
                frames.append(self._keep(last))
        return [(self._subject, frame) for frame in frames]

    def _delta(self, chunks: list[Raw]) -> Delta:
        return Delta(
            request_id=self._job.request_id,
            epoch=self._job.epoch,
            seq=self._seq,
            chunks=tuple(chunks),
            tokens=self._spend(),
            wait_us=self._spend_wait(),
            token_ids=self._spend_ids(),
            prompt_token_ids=self._spend_prompt(),
        )

    def _last_frame(self, outcome: Outcome) -> LastFrame | None:
        request_id, epoch, seq = self._job.request_id, self._job.epoch, self._seq
        match outcome:
            case Completed(usage=usage, finish_reason=finish_reason):
                chunks, self._chunks = self._chunks, []
                return Finished(
                    request_id=request_id,
                    epoch=epoch,
                    seq=seq,
                    chunks=tuple(chunks),
                    tokens=self._spend(),
                    wait_us=self._spend_wait(),
                    token_ids=self._spend_ids(),
                    prompt_token_ids=self._spend_prompt(),
                    usage=usage,
                    usage_raw=NOT_TOLD if self._usage_raw is None else Raw(self._usage_raw),
                    finish_reason=finish_reason,
                )
            case Failed(fault=fault):
                return Faulted(
                    request_id=request_id,
                    epoch=epoch,
                    seq=seq,
                    code=fault.code,
                    message=fault.message,
                    status=fault.status,
                    type=fault.type,
                    param=fault.param,
                    upstream_code=fault.upstream_code,
                    retry_after_s=fault.retry_after_s,
                )
            case HandedBack(reason=reason):
                return Yielded(request_id=request_id, epoch=epoch, seq=seq, reason=reason)
            case Cancelled(reason=reason):
                if reason == INGRESS_LOST:  # should it come back, it goes on elsewhere
                    return Yielded(request_id=request_id, epoch=epoch, seq=seq, reason=reason)
                return None

    def _keep(self, frame: AnyFrame) -> bytes:
        encoded = codec.encode(frame)
        self._kept[self._seq] = encoded
        self._kept_bytes += len(encoded)
        self._seq += 1
        while self._kept_bytes > self._max_kept_bytes:
            self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return encoded

    def _spend(self) -> int:
        tokens, self._tokens = self._tokens, 0
        return tokens

    def _spend_ids(self) -> tuple[int, ...]:
        ids, self._token_ids = tuple(self._token_ids), []
        return ids

    def _spend_prompt(self) -> tuple[int, ...]:
        ids, self._prompt_token_ids = self._prompt_token_ids, ()
        return ids

    def _spend_wait(self) -> int:
        wait_us, self._wait_us = self._wait_us, 0
        return wait_us


def _frameful(chunks: list[Raw]) -> tuple[list[Raw], list[Raw]]:
    """The first of *chunks*, as many as one frame takes, and the rest."""
    size = 0
    for number, chunk in enumerate(chunks):
        size += memoryview(chunk).nbytes
        if number and (number == CHUNKS_PER_FRAME_MAX or size > FRAME_CHUNKS_BYTES_MAX):
            return chunks[:number], chunks[number:]
    return chunks, []


class Outbox:
    """One sender for all the attempts of a worker: it runs once in a turn of the event loop, whoever has something to say."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ready: list[tuple[str, bytes]] = []
        self._dirty: dict[int, Reporter] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._sender: asyncio.Task[None] | None = None

    @property
    def frame_max_bytes(self) -> int:
        """What NATS takes as one message."""
        return self._connection.max_payload

    def start(self) -> None:
        self._sender = asyncio.create_task(self._send(), name="outbox")

    async def stop(self) -> None:
        """Returns when everything that was put has been handed to the connection. What is put later goes nowhere."""
        if self._sender is None:
            return
        await self._idle.wait()
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)
        self._sender = None

    def put(self, subject: str, frame: bytes) -> None:
        if self._sender is not None:
            self._ready.append((subject, frame))
            self._rouse()

    def wants(self, reporter: Reporter) -> bool:
        """Whether *reporter* still has to be marked in this turn."""
        return id(reporter) not in self._dirty

    def mark(self, reporter: Reporter) -> None:
        self._dirty[id(reporter)] = reporter
        self._rouse()

    def hurry(self, reporter: Reporter) -> bool:
        """Sends what *reporter* has to say in this turn already, if nobody else has said anything for a moment. False if not."""
        if self._sender is None or self._ready or self._dirty or not self._connection.is_quiet:
            return False
        frames = self._frames_of(reporter)
        if frames and not self._said_at_once(frames):
            self._ready += frames
            self._rouse()
        return True

    def _rouse(self) -> None:
        self._idle.clear()
        self._wake.set()

    async def _send(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            ready, self._ready = self._ready, []
            dirty, self._dirty = self._dirty, {}
            for reporter in dirty.values():
                ready += self._frames_of(reporter)
            if ready and not self._said_at_once(ready):
                await self._send_singly(ready)
            if not self._wake.is_set():
                self._idle.set()

    def _frames_of(self, reporter: Reporter) -> list[tuple[str, bytes]]:
        try:
            return reporter.take()
        except Exception:  # one attempt that can't be told must not silence the others
            log.exception("report_broke")
            reporter.broke()
            return []

    def _said_at_once(self, frames: list[tuple[str, bytes]]) -> bool:
        try:
            return self._connection.say_at_once(frames)
        except Exception:  # the sender must outlive it; whoever gets a frame twice drops one
            log.exception("send_broke")
            return False

    async def _send_singly(self, ready: list[tuple[str, bytes]]) -> None:
        for subject, frame in ready:
            try:
                await self._connection.say(subject, frame)
            except BusUnavailable as error:
                # The ingress misses this frame's number and asks for it again.
                log.warning("frame_not_sent", error=error.message)
            except Exception:  # nor one that can't be sent: it is missed and asked for in the same way
                log.exception("send_broke")


class KeptReports:
    """Attempts that have just ended, for an ingress that missed one of their last frames."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._reports: OrderedDict[Nonce, tuple[float, int, Reporter]] = OrderedDict()
        self._bytes = 0

    def __iter__(self) -> Iterator[Reporter]:
        return iter([reporter for _, _, reporter in self._reports.values()])

    def add(self, reporter: Reporter, *, for_s: float = KEPT_FOR_S) -> None:
        now, size = self._loop.time(), reporter.size
        self._reports[reporter.nonce] = (now + for_s, size, reporter)
        self._bytes += size
        while self._reports:
            nonce, (until, oldest, _) = next(iter(self._reports.items()))
            within = len(self._reports) <= KEPT_REPORTS_MAX and self._bytes <= KEPT_REPORTS_MAX_BYTES
            if until > now and within:
                break
            self._bytes -= oldest
            del self._reports[nonce]

    def get(self, nonce: Nonce) -> Reporter | None:
        found = self._reports.get(nonce)
        return None if found is None else found[2]
