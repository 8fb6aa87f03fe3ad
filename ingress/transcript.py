"""What one request's client was told, kept so that it can be told again.

Whoever writes never waits for whoever reads: a reader that falls behind what is kept is cut off. A part is what was sent in
one piece, one or several whole events; a body that is no stream is a single one.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple, Protocol

from starlette.types import Message

from ingress.problems import Problem, problem_of
from ingress.sse import error_event
from schemas.errors import AnswerNotKept, BadRequest, RequestCancelled
from schemas.ids import KeyId, OrgId, RequestId

EVENT = "event"  # in an ASGI message with a body: the number of the last event in it
PART_BYTES = 96  # what a part takes besides its bytes
TRANSCRIPT_BYTES = 2048  # what a transcript takes besides its parts
READ_BYTES = 64 * 1024  # read at once, if there is that much; one part at least


class Owner(NamedTuple):
    """Who may read it: the key that asked. Of two keys of an org, neither sees the other's answers."""

    org: OrgId
    key_id: KeyId


class Room(Protocol):
    """Where a transcript's bytes are counted."""

    def charge(self, size: int, /) -> bool:
        """Counts *size* bytes more (or less); False if that is more than there is room for."""


class Transcript:
    """Of one request. *grace_s*: how long the request goes on when nobody is attached to it."""

    __slots__ = (
        "_deserted",
        "_lasts",
        "_max_bytes",
        "_parts",
        "_timer",
        "_waiters",
        "attached",
        "ended",
        "first",
        "grace_s",
        "headers",
        "last",
        "on_reader",
        "owner",
        "pulses",
        "request_id",
        "room",
        "size",
        "status",
        "streamed",
    )

    def __init__(self, request_id: RequestId, owner: Owner, *, grace_s: float, room: Room, max_bytes: int) -> None:
        self.request_id = request_id
        self.owner = owner
        self.grace_s = grace_s
        self.room = room
        self.status = 0  # until the answer begins
        self.headers: list[tuple[bytes, bytes]] = []
        self.streamed = False
        self.first = 1  # the earliest event that is kept
        self.last = 0  # the latest
        self.size = TRANSCRIPT_BYTES
        self.ended = False
        self.pulses = 0  # how often it was said that the answer still takes time
        self.attached = 0
        self.on_reader: Callable[[], None] | None = None  # called once, when somebody reads
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._lasts: list[int] = []  # of each part, its last event
        self._deserted = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        room.charge(self.size)

    async def send(self, message: Message) -> None:
        """Takes what an answer sends, as ASGI's send does."""
        self.take(message)

    def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            body: bytes = message["body"]
            event = message.get(EVENT, self.last + 1)
            if not body or event == self.last:
                self.pulses += 1
            else:
                self.streamed = self.streamed or EVENT in message
                self._add(body, event)
            self.ended = not message["more_body"]
        self.wake()

    def cancel(self) -> None:
        """Ends it, if it has no end of its own: its request was cancelled."""
        if not self.ended:
            self.end(problem_of(RequestCancelled()))

    def lose(self) -> None:
        """Nobody knows how its request ended. Who reads it is cut off, and nobody can read it again."""
        if not self.ended:
            self.ended = True
            self.drop()
            self.first = self.last + 2  # also for whoever has read all that there was
            self.wake()

    def end(self, problem: Problem) -> None:
        """Ends it with an error of ours."""
        if self.status:
            self.take(
                {
                    "type": "http.response.body",
                    "body": error_event(problem.body, self.last + 1),
                    "more_body": False,
                }
            )
            return
        length = str(len(problem.body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        headers.append((b"x-request-id", self.request_id.encode()))
        self.take({"type": "http.response.start", "status": problem.status, "headers": headers})
        self.take({"type": "http.response.body", "body": problem.body, "more_body": False})

    async def deserted(self) -> Message:
        """As ASGI's receive: a disconnect, once nobody has been attached for the time of grace."""
        await self._deserted.wait()
        return {"type": "http.disconnect"}

    @property
    def is_deserted(self) -> bool:
        """Whether its request is being cancelled, or was."""
        return self._deserted.is_set()

    async def over(self) -> None:
        """Returns when it has ended."""
        while not self.ended:
            await self.waiter()

    def attach(self) -> None:
        self.attached += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def detach(self) -> None:
        self.attached -= 1
        if self.attached == 0 and not self.ended:
            if self.grace_s > 0:
                self._timer = asyncio.get_running_loop().call_later(self.grace_s, self._deserted.set)
            else:
                self._deserted.set()

    def settle(self) -> None:
        """Nothing more comes. What is too long to be kept is dropped; who reads it now is still served."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.size > self._max_bytes and self.attached == 0:
            self.drop()

    def drop(self) -> None:
        """Keeps only that it was there."""
        self._forget(len(self._parts))

    def move(self, room: Room) -> None:
        """Counts it in *room* instead."""
        self.room.charge(-self.size)
        self.room = room
        room.charge(self.size)

    def check(self, after: int) -> None:
        """Whether it can be read from event *after* + 1 on.

        Raises: BadRequest if there is no event *after*; AnswerNotKept.
        """
        if after and self.status and not self.streamed:
            raise BadRequest("This answer is no stream; ask for it without Last-Event-ID.")
        if after > self.last:
            raise BadRequest(f"There is no event {after} in this stream; its last one until now is {self.last}.")
        if after + 1 < self.first:
            raise AnswerNotKept

    def read(self, after: int) -> tuple[bytes, int]:
        """What follows event *after*, and the number of the last event in it. Nothing, if nothing has come yet.

        Raises: AnswerNotKept.
        """
        if after + 1 < self.first:
            raise AnswerNotKept
        start = bisect_right(self._lasts, after)
        if start == len(self._parts):
            return b"", after
        stop, size = start, 0
        while stop < len(self._parts) and (stop == start or size + len(self._parts[stop]) <= READ_BYTES):
            size += len(self._parts[stop])
            stop += 1
        before = self._lasts[start - 1] if start else self.first - 1
        body = self._parts[start] if stop - start == 1 else b"".join(self._parts[start:stop])
        return (body if after == before else _without(body, after)), self._lasts[stop - 1]

    def waiter(self) -> asyncio.Future[None]:
        """Resolves at the next news."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)
        return waiter

    def wake(self) -> None:
        """Lets everybody who waits look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _add(self, body: bytes, event: int) -> None:
        size = len(body) + PART_BYTES
        self._parts.append(body)
        self._lasts.append(event)
        self.last = event
        self.size += size
        if not self.room.charge(size) or self.size > self._max_bytes:
            self._forget(self._older_half())

    def _older_half(self) -> int:
        """How many parts to forget for half the size; the newest stays, as nobody can have read it yet."""
        count, size = 0, self.size - TRANSCRIPT_BYTES
        enough = size // 2
        while count < len(self._parts) - 1 and size > enough:
            size -= len(self._parts[count]) + PART_BYTES
            count += 1
        return count

    def _forget(self, count: int) -> None:
        if count == 0:
            return
        freed = sum(len(part) + PART_BYTES for part in self._parts[:count])
        self.first = self._lasts[count - 1] + 1
        del self._parts[:count], self._lasts[:count]
        self.size -= freed
        self.room.charge(-freed)
        self.wake()


def _without(body: bytes, after: int) -> bytes:
    """*body* less its events up to *after*. A line that begins like this can't be within an event: JSON has no raw newlines."""
    return body[body.index(b"\n\nid: %d\n" % (after + 1)) + 2 :]
