"""Credit-based pull: never asks a consumer for more messages than it was granted, and re-arms itself.

nats-py's ``fetch`` stalls for its whole time-out over a reconnect and leaves pulls behind when it is cancelled. Here each
pull request has a reply subject of its own, so that whatever becomes of it (messages, expiry, a deleted consumer, a
server that went away) gives its unused credit back, and the credit is asked for again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bus.connection import Connection
from schemas.errors import PenstockError

log = structlog.get_logger()

EXPIRES_S = 10.0  # how long the server keeps a pull that nothing came for
LAPSE_GRACE_S = 2.0
RETRY_WAIT_S = 0.1
PENDING_BYTES_MAX = 256 * 1024 * 1024

OnMessage = Callable[[Msg], Awaitable[None]]
Ensure = Callable[[], Awaitable[str]]


class _Pull:
    __slots__ = ("deadline", "left")

    def __init__(self, left: int, deadline: float) -> None:
        self.left = left
        self.deadline = deadline


class Puller:
    """Pulls from one consumer of *stream*.

    *ensure* makes the consumer when it isn't there and returns its name; *on_message* gets each message, in order, and
    must return quickly. One credit is one message; `grant` gives more.
    """

    def __init__(self, connection: Connection, *, stream: str, ensure: Ensure, on_message: OnMessage) -> None:
        self._connection = connection
        self._stream = stream
        self._ensure = ensure
        self._on_message = on_message
        self._inbox = connection.nc.new_inbox()
        self._numbers = count()
        self._pulls: dict[str, _Pull] = {}
        self._credit = 0  # granted and not asked for
        self._consumer: str | None = None
        self._subscription: Subscription | None = None
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Raises: ApiError, BusUnavailable if the consumer can't be made."""
        self._consumer = await self._ensure()
        self._subscription = await self._connection.nc.subscribe(
            f"{self._inbox}.*", cb=self._on_reply, pending_bytes_limit=PENDING_BYTES_MAX
        )
        self._connection.on_reconnect(self._rearm)
        self._runner = asyncio.create_task(self._run(), name=f"puller-{self._consumer}")

    async def stop(self) -> None:
        """Asks for nothing more. The server forgets the pulls when their inbox is gone; what came already was handed on."""
        subscription, self._subscription = self._subscription, None
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        if subscription is not None:
            try:
                await subscription.unsubscribe()
                await self._connection.nc.flush(1)
            except (nats.errors.Error, OSError) as error:
                log.debug("unsubscribe_failed", error=type(error).__name__)

    def grant(self, credit: int) -> None:
        self._credit += credit
        self._wake.set()

    def renew(self) -> None:
        """Forgets the consumer and all pulls; the consumer is made again. For a reader that has to begin elsewhere."""
        self._consumer = None
        self._reclaim_all()

    async def _run(self) -> None:
        """Turns credit into pull requests; wakes for new credit and for pulls that lapsed without a word."""
        while True:
            try:
                async with asyncio.timeout(LAPSE_GRACE_S):
                    await self._wake.wait()
            except TimeoutError:
                self._reclaim_lapsed()
            self._wake.clear()
            if self._credit == 0 or not self._connection.is_up:
                continue
            try:
                if self._consumer is None:
                    self._consumer = await self._ensure()
                await self._ask()
            except (PenstockError, nats.errors.Error) as error:
                log.debug("pull_failed", stream=self._stream, error=type(error).__name__)
                await asyncio.sleep(RETRY_WAIT_S)
                self._wake.set()

    async def _ask(self) -> None:
        number, batch, self._credit = str(next(self._numbers)), self._credit, 0
        self._pulls[number] = _Pull(batch, self._loop.time() + EXPIRES_S + LAPSE_GRACE_S)
        await self._connection.nc.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
            b'{"batch":%d,"expires":%d}' % (batch, int(EXPIRES_S * 1e9)),
            reply=f"{self._inbox}.{number}",
        )

    async def _on_reply(self, msg: Msg) -> None:
        number = msg.subject.rpartition(".")[2]
        pull = self._pulls.get(number)
        status = msg.headers.get("Status") if msg.headers else None
        if status is None:
            if pull is not None:
                pull.left -= 1
                if pull.left == 0:
                    del self._pulls[number]
            await self._on_message(msg)
        elif status != "100" and pull is not None:
            del self._pulls[number]
            if status not in ("408", "404"):  # not just expired: the consumer or JetStream itself is gone or changed
                self._consumer = None
            self.grant(pull.left)

    async def _rearm(self) -> None:
        """After a reconnect: the server has forgotten every pull, and may have lost the consumer."""
        self._consumer = None
        self._reclaim_all()

    def _reclaim_all(self) -> None:
        left = sum(pull.left for pull in self._pulls.values())
        self._pulls.clear()
        self.grant(left)

    def _reclaim_lapsed(self) -> None:
        now = self._loop.time()
        for number in [n for n, pull in self._pulls.items() if now > pull.deadline]:
            self.grant(self._pulls.pop(number).left)
