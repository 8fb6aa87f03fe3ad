"""The transcripts that can be read again: which there are, for how long, and how many bytes of them. In memory only.

There are three rooms, each with bounds of its own, so that none takes from another: for answers with an Idempotency-Key, for
those whose client asked to be able to resume, and for streams that nobody asked to keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from ingress.transcript import Owner, Transcript
from schemas.errors import AnswerNotFound, IdempotencyKeyReused
from schemas.ids import RequestId
from schemas.settings import IngressSettings

SWEEP_EVERY_S = 5.0
KEYED_SHARE, RESUMABLE_SHARE, UNASKED_SHARE = 0.5, 0.375, 0.125  # of ``ingress.max_kept_bytes``


class Room:
    """The bytes of one sort of transcripts, and those of them that have ended, each kept for *keep_s* seconds.

    When the bytes are over their bound, the oldest that have ended lose what they hold, and then their names.
    """

    def __init__(
        self, *, keep_s: float, max_bytes: int, max_answers: int, forget: Callable[[Transcript], None]
    ) -> None:
        self.bytes = 0
        self._keep_s = keep_s
        self._max_bytes = max_bytes
        self._max_answers = max_answers
        self._forget = forget
        self._ended: OrderedDict[RequestId, tuple[Transcript, float]] = OrderedDict()
        self._full: deque[Transcript] = deque()  # of those, which still hold something

    def __len__(self) -> int:
        return len(self._ended)

    def charge(self, size: int, /) -> bool:
        self.bytes += size
        while self.bytes > self._max_bytes:
            if self._full:
                self._full.popleft().drop()
            elif self._ended:
                self._forget_oldest()
            else:
                return False
        return True

    def shelve(self, transcript: Transcript, now: float) -> None:
        """*transcript* has ended."""
        self._ended[transcript.request_id] = (transcript, now + self._keep_s)
        self._full.append(transcript)
        if len(self._ended) > self._max_answers:
            self._forget_oldest()

    def expire(self, now: float) -> None:
        while self._ended and next(iter(self._ended.values()))[1] <= now:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, (transcript, _) = self._ended.popitem(last=False)
        if self._full and self._full[0] is transcript:
            self._full.popleft()
        transcript.drop()
        self.bytes -= transcript.size
        self._forget(transcript)


class Claim(NamedTuple):
    """Whose Idempotency-Key it is, and which."""

    owner: Owner
    key: str

    @property
    def name(self) -> str:
        """For what other ingresses may see: the key itself is its client's."""
        return hashlib.sha256("\0".join((*self.owner, self.key)).encode()).hexdigest()


class Archive:
    """Finds transcripts by request and by Idempotency-Key."""

    def __init__(self, settings: IngressSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = settings.max_kept_answer_bytes
        self._keeps_unasked = settings.resume_s > 0
        self._clock = clock
        self._keyed = self._room(settings, settings.idempotency_s, KEYED_SHARE)
        self._resumable = self._room(settings, settings.resume_s, RESUMABLE_SHARE)
        self._unasked = self._room(settings, settings.resume_s, UNASKED_SHARE)
        self._by_request: dict[RequestId, Transcript] = {}
        self._by_key: dict[Claim, tuple[Transcript, bytes]] = {}
        self._claims: dict[RequestId, Claim] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._by_request)

    @property
    def kept_bytes(self) -> int:
        return sum(room.bytes for room in self._rooms)

    def open(self, request_id: RequestId, owner: Owner, *, grace_s: float) -> Transcript:
        """A new transcript of a request that goes on for *grace_s* without its client."""
        return self._open(request_id, owner, grace_s=grace_s, room=self._resumable)

    def open_unasked(self, request_id: RequestId, owner: Owner) -> Transcript | None:
        """The same for a stream whose client asked for nothing; None if such aren't kept."""
        return self._open(request_id, owner, grace_s=0, room=self._unasked) if self._keeps_unasked else None

    def claim(self, request_id: RequestId, claim: Claim, *, body: bytes, grace_s: float) -> Transcript:
        """The same for an Idempotency-Key that nobody has here: `find_claim` found nothing."""
        assert claim not in self._by_key  # noqa: S101 - else two would generate
        transcript = self._open(request_id, claim.owner, grace_s=grace_s, room=self._keyed)
        self._by_key[claim] = transcript, fingerprint(body)
        self._claims[request_id] = claim
        return transcript

    def find_claim(self, claim: Claim, *, body: bytes) -> Transcript | None:
        """What was said under this key already. Raises: IdempotencyKeyReused if it was for another body."""
        self._expire()
        found = self._by_key.get(claim)
        if found is None:
            return None
        transcript, known = found
        if known != fingerprint(body):
            raise IdempotencyKeyReused
        return transcript

    def is_claimed(self, request_id: RequestId) -> bool:
        """Whether who tries again with its Idempotency-Key is told what it was."""
        return request_id in self._claims

    def find(self, owner: Owner, request_id: RequestId) -> Transcript:
        """Raises: AnswerNotFound, also if it is somebody else's."""
        self._expire()
        found = self._by_request.get(request_id)
        if found is None or found.owner != owner:
            raise AnswerNotFound
        return found

    def settle(self, transcript: Transcript, *, served: bool = True) -> None:
        """*transcript* has ended. What was neither *served* nor billed may be tried again under the same key."""
        transcript.cancel()
        if not served:
            self._unclaim(transcript)
        if self._by_request.get(transcript.request_id) is not transcript:
            return
        room = transcript.room
        assert isinstance(room, Room)  # noqa: S101 - it was opened here
        room.shelve(transcript, self._clock())
        transcript.settle()
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_EVERY_S, self._sweep)

    @property
    def _rooms(self) -> tuple[Room, ...]:
        return self._keyed, self._resumable, self._unasked

    def _room(self, settings: IngressSettings, keep_s: float, share: float) -> Room:
        return Room(
            keep_s=keep_s,
            max_bytes=int(settings.max_kept_bytes * share),
            max_answers=settings.max_kept_answers,
            forget=self._forget,
        )

    def _open(self, request_id: RequestId, owner: Owner, *, grace_s: float, room: Room) -> Transcript:
        transcript = Transcript(request_id, owner, grace_s=grace_s, room=room, max_bytes=self._max_bytes)
        self._by_request[request_id] = transcript
        return transcript

    def _unclaim(self, transcript: Transcript) -> None:
        claim = self._claims.pop(transcript.request_id, None)
        if claim is not None:
            del self._by_key[claim]
            transcript.move(self._resumable)

    def _forget(self, transcript: Transcript) -> None:
        del self._by_request[transcript.request_id]
        claim = self._claims.pop(transcript.request_id, None)
        if claim is not None:
            del self._by_key[claim]

    def _expire(self) -> None:
        now = self._clock()
        for room in self._rooms:
            room.expire(now)

    def _sweep(self) -> None:
        self._expire()
        left = any(len(room) for room in self._rooms)
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_EVERY_S, self._sweep) if left else None


def fingerprint(body: bytes) -> bytes:
    """Of what a request's body says: spaces, escapes and the order of members don't count, as JSON writers differ in them."""
    with contextlib.suppress(
        msgspec.DecodeError, RecursionError
    ):  # such as a number beyond a double's range: as it came, then
        body = msgspec.json.encode(msgspec.json.decode(body), order="sorted")
    return hashlib.sha256(body).digest()
