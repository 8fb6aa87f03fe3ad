"""Reads EVENTS and CONTROL and stores them, each event exactly once, killed at any moment or not.

A stream is read by a consumer that acknowledges nothing, from the message behind the cursor on; what was read and the new cursor are
stored in one transaction. So after any crash the ledger goes on where its last commit ended. A gap is never skipped: what
is missing is missing for good, and the ledger says so and stops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from bus.connection import ApiError, BusUnavailable, Connection
from bus.reader import OrderedReader, StoredMessage
from bus.streams import UNAVAILABLE_STATUS, stream_state
from ledger.batch import Cursor
from ledger.store import Store, StoreOutOfMemory
from schemas import subjects
from schemas.control import AnyControlEvent, ControlEvent, ControlState
from schemas.errors import PenstockError, SetupError

log = structlog.get_logger()

IDLE_WAIT_S = 0.1  # how long a read waits before it looks whether to stop
FULL_BATCH = 256  # so many messages at once: there are more, so the next commit doesn't wait
GATHER_MAX_S = 0.5  # no query waits for it: see `catch_up`
GATHER_SHARE = 50  # a small commit is followed by up to so many times its own length of gathering
DRAIN_S = 10.0
CHECK_AGAIN_S = 0.2
OUT_OF_MEMORY_TRIES = 5


class Writer:
    """Follows both streams of *connection* into *store*. *control* is the fold of CONTROL, as far as it is stored."""

    def __init__(
        self,
        connection: Connection,
        store: Store,
        *,
        batch_pages: int,
        free_memory: Callable[[], None] = lambda: None,
    ) -> None:
        self.control = ControlState()
        self._connection = connection
        self._store = store
        self._batch_pages = batch_pages
        self._free_memory = free_memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._cursors: dict[str, Cursor] = {}
        self._readers: dict[str, OrderedReader] = {}
        self._unsure: set[str] = set()  # streams that may have been replaced while we were disconnected
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()  # somebody waits for what is not stored yet
        self._hurrying = 0
        self._moved = asyncio.Event()  # a cursor has moved
        self._caught_up = {name: asyncio.Event() for name in (subjects.CONTROL, subjects.EVENTS)}

    @property
    def cursors(self) -> dict[str, Cursor]:
        return dict(self._cursors)

    @property
    def caught_up(self) -> bool:
        """Everything that was in the streams when this began is stored."""
        return all(event.is_set() for event in self._caught_up.values())

    async def keys_known(self) -> None:
        """Returns when everything stated before the start is folded: before that, nobody's key would be known."""
        await self._caught_up[subjects.CONTROL].wait()

    async def start(self) -> None:
        """Checks that the streams go on where the ledger ended, and begins to read.

        Raises: SetupError if they don't; ApiError, BusUnavailable.
        """
        for event in self._store.control_events():
            self.control.apply(event)
        for name in (subjects.CONTROL, subjects.EVENTS):
            cursor = await self._same_stream(self._store.read_cursor(name))
            reader = OrderedReader(self._connection, stream=name, after=cursor.last_seq)
            await reader.start()
            self._cursors[name], self._readers[name] = cursor, reader
            if reader.caught_up:
                self._caught_up[name].set()
        self._connection.on_reconnect(self._doubt)

    async def run(self) -> None:
        """Stores until `stop`, and then what is still to be had, for at most `DRAIN_S`.

        Raises: StreamGap if messages are missing, SetupError if a stream was replaced, StoreFailed if the file can't be written.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for name in self._readers:
                    group.create_task(self._follow(name), name=f"follow-{name}")
        except ExceptionGroup as group_error:
            error = _first(group_error)
            log.error("ledger_failed", error=str(error))
            raise error from group_error
        finally:
            for reader in self._readers.values():
                await reader.close()
            self._thread.shutdown(wait=True)

    def stop(self) -> None:
        self._stopping.set()
        self._hurry.set()

    async def catch_up(self, *, within_s: float) -> bool:
        """Stores all that was in EVENTS when this was called, so that a query sees every event that was durable before it.

        False if that takes longer than *within_s*, or NATS can't tell how far it is: then a query sees what there is.
        """
        self._hurrying += 1
        self._hurry.set()
        try:
            async with asyncio.timeout(within_s):
                wanted = int((await stream_state(self._connection, subjects.EVENTS))["last_seq"])
                while self._cursors[subjects.EVENTS].last_seq < wanted:
                    self._moved.clear()
                    await self._moved.wait()
        except (TimeoutError, ApiError, BusUnavailable):
            return False
        finally:
            self._hurrying -= 1
            if self._hurrying == 0 and not self._stopping.is_set():
                self._hurry.clear()
        return True

    async def pending(self) -> dict[str, int]:
        """How many messages of each stream are not stored yet.

        Raises: ApiError, BusUnavailable.
        """
        return {name: await reader.pending() for name, reader in self._readers.items()}

    async def _follow(self, name: str) -> None:
        reader, drain_until, last_seq = self._readers[name], None, None
        while True:
            messages = await reader.batch(max_messages=self._batch_pages, wait_s=self._wait_s())
            if messages:
                took_s = await self._store_batch(name, messages)
                if reader.caught_up:
                    self._caught_up[name].set()
                # What an operator states, such as that a key is revoked, counts at once.
                if name == subjects.EVENTS and len(messages) < FULL_BATCH:
                    await self._gather(took_s)
            elif not self._caught_up[name].is_set() and await self._nothing_left(reader):
                self._caught_up[name].set()
            if self._stopping.is_set():
                drain_until = drain_until or time.monotonic() + DRAIN_S
                if last_seq is None:  # what comes later is for the next start: under load there is always more
                    last_seq = await self._last_seq(name)
                if last_seq is not None and self._cursors[name].last_seq >= last_seq:
                    return
                if time.monotonic() > drain_until:
                    log.warning("drain_incomplete", log=name)
                    return

    def _wait_s(self) -> float:
        return 0.05 if self._stopping.is_set() else IDLE_WAIT_S

    async def _gather(self, took_s: float) -> None:
        """Lets some more messages come, so that a thin stream of them doesn't cost a commit each."""
        try:
            async with asyncio.timeout(min(GATHER_MAX_S, took_s * GATHER_SHARE)):
                await self._hurry.wait()
        except TimeoutError:
            pass

    async def _store_batch(self, name: str, messages: Sequence[StoredMessage]) -> float:
        """Stores *messages*; returns how long it took, in seconds."""
        began = time.monotonic()
        if name in self._unsure:
            await self._make_sure(name)
        cursor, stated = await self._append(messages, self._cursors[name])
        self._cursors[name] = cursor
        self._moved.set()
        for event in stated:
            self.control.apply(event)
        took_s = time.monotonic() - began
        log.debug(
            "batch_stored", log=name, messages=len(messages), position=cursor.last_position, took_ms=took_s * 1000
        )
        return took_s

    async def _append(self, messages: Sequence[StoredMessage], cursor: Cursor) -> tuple[Cursor, list[AnyControlEvent]]:
        loop = asyncio.get_running_loop()
        for again in range(1, OUT_OF_MEMORY_TRIES + 1):
            try:
                new, entries = await loop.run_in_executor(self._thread, self._store.append, messages, cursor)
            except StoreOutOfMemory:
                if again == OUT_OF_MEMORY_TRIES:
                    raise
                log.warning("memory_needed", log=cursor.log, again=again)
                self._free_memory()  # analysts' queries share the database's memory; the writer goes first
                await asyncio.sleep(0.2 * again)
            else:
                return new, [e.event for _, e in entries if isinstance(e.event, ControlEvent)]
        raise AssertionError("unreachable")

    async def _same_stream(self, cursor: Cursor) -> Cursor:
        """*cursor*, if its stream is the one that it was read from.

        Raises: SetupError if the stream was made anew or has lost its end.
        """
        answer = await self._connection.api(f"STREAM.INFO.{cursor.log}")
        created, last_seq = str(answer["created"]), int(answer["state"]["last_seq"])
        if cursor.stream_created not in (None, created) or last_seq < cursor.last_seq:
            raise SetupError(
                f"the stream {cursor.log} is not the one that this ledger has read to message {cursor.last_seq}: "
                f"it was made at {created} and ends at message {last_seq}. Connect the ledger to the NATS it belongs to, "
                "or begin a new ledger in another home folder."
            )
        if cursor.stream_created is None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._store.bind_stream, cursor.log, created)
        return cursor._replace(stream_created=created)

    async def _make_sure(self, name: str) -> None:
        """Checks that the stream is still the same, again while NATS gives no answer: it may be away once more.

        Raises: SetupError if it isn't; when the writer is to stop also ApiError, BusUnavailable.
        """
        while name in self._unsure:
            try:
                await self._same_stream(self._cursors[name])
            except (ApiError, BusUnavailable) as error:
                if self._stopping.is_set() or (isinstance(error, ApiError) and error.status != UNAVAILABLE_STATUS):
                    raise
                log.debug("stream_not_checked", log=name, error=error.message)
                await asyncio.sleep(CHECK_AGAIN_S)
            else:
                self._unsure.discard(name)

    async def _last_seq(self, name: str) -> int | None:
        """Where the stream ends now; None while NATS can't tell."""
        try:
            return int((await stream_state(self._connection, name))["last_seq"])
        except PenstockError as error:
            log.debug("end_unknown", log=name, error=error.message)
            return None

    async def _nothing_left(self, reader: OrderedReader) -> bool:
        try:
            return await reader.pending() == 0
        except PenstockError as error:  # NATS is away: what is left can't be known, so go on waiting
            log.debug("pending_unknown", error=error.message)
            return False

    async def _doubt(self) -> None:
        self._unsure.update(self._readers)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a task group that is not itself a group."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
