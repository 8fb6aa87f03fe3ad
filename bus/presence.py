"""Which ingresses are there: an ingress says so regularly, and who depends on it listens.

Silence is only worth something while we could hear. After our own connection was away, or this process stood still, everybody
has the full time again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from bus.connection import BusUnavailable, Connection, Forget, Message
from schemas import codec, subjects
from schemas.ids import IngressId
from schemas.jobs import PRESENCE_EVERY_S, IngressPresence, IngressState

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
ANSWER_WAIT_S = 0.3
STOOD_STILL_S = 2.0  # a look that comes so much too late: what was said meanwhile is still to be heard
FORGOTTEN_AFTER_S = 3600.0
INGRESSES_MAX = 10_000


class Beacon:
    """Says for an ingress that it is there, until it is gone. *on_lapse* is called when it could not for a while."""

    def __init__(
        self,
        connection: Connection,
        ingress: IngressId,
        *,
        version: str = "",
        on_lapse: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._connection = connection
        self._ingress = ingress
        self._version = version
        self._started_ns = time.time_ns()
        self._on_lapse = on_lapse
        self._said_at = time.monotonic()
        self._beating: asyncio.Task[None] | None = None
        self._forget: Forget | None = None

    async def start(self) -> None:
        await self._connection.listen(subjects.here(self._ingress), _nothing)
        await self._say(IngressState.SERVING)
        self._forget = self._connection.on_reconnect(self._beat)
        self._beating = asyncio.create_task(self._beat_regularly(), name="ingress-presence")

    async def stop(self) -> None:
        """Says that the ingress is gone. To be called when everything that it had to record is recorded."""
        if self._beating is None:
            return
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)
        self._beating = None
        if self._forget is not None:
            self._forget()
        await self._say(IngressState.GONE)

    async def _beat_regularly(self) -> None:
        while True:
            await asyncio.sleep(PRESENCE_EVERY_S)
            await self._beat()

    async def _beat(self) -> None:
        lapse_s = time.monotonic() - self._said_at
        await self._say(IngressState.SERVING)
        if lapse_s > PRESENCE_EVERY_S + STOOD_STILL_S and self._on_lapse is not None:
            log.info("presence_lapsed", lapse_s=round(lapse_s, 1))
            await self._on_lapse()

    async def _say(self, state: IngressState) -> None:
        presence = IngressPresence(
            ingress=self._ingress, state=state, started_ns=self._started_ns, version=self._version
        )
        if not self._connection.is_up:
            return  # and not into the buffer: it would be said when it is old
        try:
            await self._connection.say(subjects.ingress_presence(self._ingress), codec.encode(presence))
        except BusUnavailable as error:
            log.debug("presence_not_sent", error=error.message)
        else:
            self._said_at = time.monotonic()


class Roll:
    """When each ingress was heard last."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._heard: dict[IngressId, float] = {}
        self._gone: dict[IngressId, float] = {}  # those that took their leave
        self._listening_since = math.inf
        self._looked_at = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._forget: Forget | None = None

    async def start(self) -> None:
        await self._connection.listen(subjects.ALL_INGRESS_PRESENCE, self._on_presence)
        self._forget = self._connection.on_reconnect(self._begin_anew)
        await self._begin_anew()
        self._looking = asyncio.create_task(self._look_regularly(), name="ingress-roll")

    async def stop(self) -> None:
        if self._forget is not None:
            self._forget()
            self._forget = None
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    def silent_s(self, ingress: IngressId, *, since: float = 0.0) -> float:
        """For how long *ingress* has said nothing; infinite if it took its leave.

        It counts from *since* (the loop's time) at the earliest, and from when we could hear it.
        """
        if ingress in self._gone:
            return math.inf
        now = self._loop.time()
        if not self._connection.is_up or now - self._looked_at > LOOK_EVERY_S + STOOD_STILL_S:
            return 0.0
        return now - max(self._heard.get(ingress, 0.0), self._listening_since, since)

    def has_heard(self, ingress: IngressId) -> bool:
        return ingress in self._heard or ingress in self._gone

    async def is_listening(self, ingress: IngressId) -> bool:
        """Whether *ingress* has a connection. Where that can't be told, it has one."""
        return not self._connection.is_up or await self._connection.has_listener(
            subjects.here(ingress), within_s=ANSWER_WAIT_S
        )

    async def _begin_anew(self) -> None:
        self._listening_since = self._looked_at = self._loop.time()

    async def _on_presence(self, msg: Message) -> None:
        try:
            presence = codec.decode_ingress_presence(msg.data)
        except msgspec.MsgspecError:
            log.warning("presence_unreadable", subject=msg.subject)
            return
        now = self._loop.time()
        if presence.state is IngressState.GONE:
            self._heard.pop(presence.ingress, None)
            self._gone[presence.ingress] = now
        elif presence.ingress in self._heard or len(self._heard) < INGRESSES_MAX:
            self._heard[presence.ingress] = now
            self._gone.pop(presence.ingress, None)

    async def _look_regularly(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            now = self._loop.time()
            if now - self._looked_at > LOOK_EVERY_S + STOOD_STILL_S:
                log.info("stood_still", for_s=round(now - self._looked_at, 1))
                self._listening_since = now
            self._looked_at = now
            self._tidy(now)

    def _tidy(self, now: float) -> None:
        for known in (self._heard, self._gone):
            for ingress in [each for each, at in known.items() if now - at > FORGOTTEN_AFTER_S]:
                del known[ingress]
        while len(self._gone) > INGRESSES_MAX:
            del self._gone[next(iter(self._gone))]


async def _nothing(_: Message) -> None:
    """What is said there is of no interest; that somebody listens is."""
