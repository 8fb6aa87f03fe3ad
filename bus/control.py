"""CONTROL: state a fact about the deployment, and follow all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from bus.connection import WRONG_LAST_SEQUENCE, ApiError, BusUnavailable, Connection, MessageTooLarge
from bus.publisher import Publisher
from bus.reader import OrderedReader, StoredMessage
from schemas import codec, subjects
from schemas.control import AnyControlEvent, ControlState, KeyStated, OrgStated, RouteStated, decode_control
from schemas.errors import Conflict, LogUnavailable, PenstockError

log = structlog.get_logger()

STATE_TIMEOUT_S = 5.0
BATCH_MAX = 500
CATCH_UP_TIMEOUT_S = 20.0


class ControlFeed:
    """The fold of CONTROL, kept up to date. Statements are made with the sequence number they are based on."""

    def __init__(self, connection: Connection, publisher: Publisher) -> None:
        self.state = ControlState()
        self._connection = connection
        self._publisher = publisher
        self._reader = OrderedReader(connection, stream=subjects.CONTROL, last_per_subject=True)
        self._seqs: dict[str, int] = {}  # subject -> the sequence number of its last message
        self._changed: list[Callable[[AnyControlEvent], None]] = []
        self._moved = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when everything stated so far is folded.

        Raises: ApiError, BusUnavailable; TimeoutError if CONTROL can't be read in time.
        """
        await self._reader.start()
        async with asyncio.timeout(CATCH_UP_TIMEOUT_S):
            while not self._reader.caught_up:
                self._fold(await self._reader.batch(max_messages=BATCH_MAX, wait_s=1.0))
        self._follower = asyncio.create_task(self._follow(), name="control-feed")

    async def stop(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        await self._reader.close()

    def on_change(self, callback: Callable[[AnyControlEvent], None]) -> None:
        self._changed.append(callback)

    async def say(self, event: AnyControlEvent) -> None:
        """States *event* and returns when this process has folded it.

        Raises: Conflict if somebody else stated something about the same entity meanwhile, LogUnavailable if it can't be
        recorded, or is recorded and doesn't come back in time.
        """
        subject = _subject(event)
        headers = {"Nats-Expected-Last-Subject-Sequence": str(self._seqs.get(subject, 0)), "Nats-Msg-Id": event.id}
        try:
            seq = await self._publisher.publish(
                subject, codec.encode(event), timeout_s=STATE_TIMEOUT_S, headers=headers
            )
        except ApiError as error:
            if error.error_code in WRONG_LAST_SEQUENCE:
                raise Conflict from error
            raise LogUnavailable(f"the change could not be recorded: {error.message}") from error
        except (BusUnavailable, MessageTooLarge) as error:
            raise LogUnavailable(f"the change could not be recorded: {error.message}") from error
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                while self._seqs.get(subject, 0) < seq:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError as error:
            raise LogUnavailable("the change is recorded, but can't be read back at the moment") from error

    async def _follow(self) -> None:
        while True:
            try:
                self._fold(await self._reader.batch(max_messages=BATCH_MAX, wait_s=60.0))
            except PenstockError as error:
                log.error("control_feed_failed", error=error.message)
                await asyncio.sleep(1.0)

    def _fold(self, messages: list[StoredMessage]) -> None:
        for subject, seq, data in messages:
            try:
                event = decode_control(data)
            except msgspec.MsgspecError:
                log.info("control_event_unknown", subject=subject, seq=seq)  # a newer release wrote it
            else:
                self.state.apply(event)
                self._tell(event)
            self._seqs[subject] = seq
        self._moved.set()

    def _tell(self, event: AnyControlEvent) -> None:
        for callback in self._changed:
            try:
                callback(event)
            except Exception:  # what a listener makes of it must not end the feed
                log.exception("control_listener_broke", callback=callback.__qualname__)


def _subject(event: AnyControlEvent) -> str:
    match event:
        case OrgStated():
            return subjects.control("org", event.org)
        case KeyStated():
            return subjects.control("key", event.key_id)
        case RouteStated():
            return subjects.control("route", event.route)
