"""A stream read in order from a sequence number on, refusing gaps.

An explicit-ack consumer with a high-water mark loses events, because redelivery is out of order. So this reads with an
AckNone consumer that begins behind the reader's own position. Such a consumer numbers its deliveries, too: if one of them is
missing, messages were lost on the way, and the consumer is made anew; if none is and the stream's next message still isn't the
first that comes, that one is gone: `StreamGap`.

A message that is sent as soon as it is stored wakes the server's reader and this process for itself alone. So while nobody waits in
`batch`, only such messages are asked for as are known to be there, to have them at hand; what is stored meanwhile is asked for by
the next call: for one message, which says how many are behind it, and then for all of those at once.
Source: docs/adr/0011-append.md
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from nats.aio.msg import Msg

from bus.connection import Connection
from bus.puller import Puller
from bus.streams import SECOND_NS, ensure_consumer, stream_state
from schemas.errors import PenstockError
from schemas.ids import new_name

WINDOW = 512  # messages asked for and not handed out yet
BURST_WAIT_S = 0.1  # for the rest of what was there, once the first of it has come
READER_IDLE_S = 30
SHORT_LOOKS_MAX = 10
SHORT_LOOK_EVERY_S = 0.1


class StoredMessage(NamedTuple):
    subject: str
    seq: int
    data: bytes


class StreamGap(PenstockError):
    """Messages are missing from the stream."""

    code = "stream_gap"

    def __init__(self, *, stream: str, expected: int, got: int) -> None:
        super().__init__(f"{stream} has no message {expected}: the next one is {got}")
        self.expected = expected
        self.got = got


class OrderedReader:
    """Reads *stream* from the message behind *after* on.

    With *last_per_subject* it begins with the last message on each subject (for a fold) and then goes on with what is new;
    holes are normal then, and only the order is kept.
    """

    def __init__(self, connection: Connection, *, stream: str, after: int = 0, last_per_subject: bool = False) -> None:
        self._connection = connection
        self._stream = stream
        self._seen = after  # the last message received
        self._handed = after  # the last message handed out
        self._fold = last_per_subject
        self._consumer = ""  # the present one; what others still send is not for us
        self._deliveries = 0  # that have come from it
        self._waiting: deque[StoredMessage] = deque()
        self._arrived = asyncio.Event()
        self._gap: StreamGap | None = None
        self._behind = 0  # so many were left to read when the last message came, or when the reader began
        self._loop = asyncio.get_running_loop()
        self._puller = Puller(connection, stream=stream, ensure=self._make_consumer, on_message=self._on_message)

    async def start(self) -> None:
        """Raises: ApiError, BusUnavailable."""
        await self._puller.start()
        self._ask()

    async def close(self) -> None:
        await self._puller.stop()

    @property
    def caught_up(self) -> bool:
        """Nothing was left to read when the last message came, or when the reader began."""
        return self._behind == 0 and not self._waiting

    async def pending(self) -> int:
        """How many stored messages have not been handed out yet.

        Raises: ApiError, BusUnavailable.
        """
        state = await stream_state(self._connection, self._stream)
        return max(0, int(state["last_seq"]) - self._handed)

    async def batch(self, *, max_messages: int, wait_s: float) -> list[StoredMessage]:
        """What is there, at most *max_messages*; waits up to *wait_s* for the first. May be empty.

        Raises: StreamGap.
        """
        if not self._waiting and self._gap is None:
            self._ask(at_least=1)
            if not await self._arrives(wait_s):
                return []
        until = self._loop.time() + BURST_WAIT_S
        while self._more_comes(max_messages) and await self._arrives(until - self._loop.time()):
            pass
        if self._gap is not None and not self._waiting:
            raise self._gap
        taken = [self._waiting.popleft() for _ in range(min(max_messages, len(self._waiting)))]
        self._handed = taken[-1].seq
        self._ask()
        return taken

    def _ask(self, *, at_least: int = 0) -> None:
        """Asks for what is known to be there, or for *at_least* so many; for no more than the window takes."""
        wanted = min(WINDOW - len(self._waiting), max(self._behind, at_least))
        if wanted > self._puller.credit:
            self._puller.grant(wanted - self._puller.credit)

    def _more_comes(self, max_messages: int) -> bool:
        """Whether more is there than has come, and has been asked for."""
        return len(self._waiting) < max_messages and min(self._behind, self._puller.credit) > 0 and self._gap is None

    async def _arrives(self, wait_s: float) -> bool:
        """Whether a message comes, or a gap shows, within *wait_s*."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    async def _make_consumer(self) -> str:
        self._consumer = ""
        config: dict[str, object] = {
            "name": new_name("reader"),
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": READER_IDLE_S * SECOND_NS,
        }
        if self._fold and self._seen == 0:
            config["deliver_policy"] = "last_per_subject"
            config["filter_subjects"] = [f"{self._stream.lower()}.>"]
        else:
            await self._refuse_other_stream()
            config["deliver_policy"] = "by_start_sequence"
            config["opt_start_seq"] = self._seen + 1
        answer = await ensure_consumer(self._connection, self._stream, config)
        self._behind = int(answer["num_pending"])
        self._deliveries = 0
        self._consumer = str(answer["name"])
        return self._consumer

    async def _refuse_other_stream(self) -> None:
        """A stream that ends before what we have seen is another one: the server would wait for ours to be reached, silently."""
        for _ in range(SHORT_LOOKS_MAX):
            last = int((await stream_state(self._connection, self._stream))["last_seq"])
            if last >= self._seen:
                return
            await asyncio.sleep(SHORT_LOOK_EVERY_S)  # a cluster's new leader may not have come so far yet
        self._refuse(got=last + 1)

    def _on_message(self, msg: Msg) -> None:
        metadata = msg.metadata
        if metadata.consumer != self._consumer or self._gap is not None:
            self._puller.grant(1)  # from a consumer that we have left
            return
        seq, behind = metadata.sequence.stream, metadata.num_pending or 0
        self._deliveries += 1
        hole = not self._fold and seq != self._seen + 1
        if metadata.sequence.consumer != self._deliveries or (hole and self._deliveries > 1):
            self._consumer = ""
            self._puller.grant(1)
            self._puller.renew()
        elif hole:
            self._puller.grant(1)
            self._refuse(got=seq)
        else:
            self._seen = seq
            self._behind = behind
            self._waiting.append(StoredMessage(msg.subject, seq, msg.data))
            self._ask()
            self._arrived.set()

    def _refuse(self, *, got: int) -> None:
        self._gap = StreamGap(stream=self._stream, expected=self._seen + 1, got=got)
        self._arrived.set()
