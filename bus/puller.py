"""Credit-based pull: never asks a consumer for more messages than it was granted, and re-arms itself.

nats-py's ``fetch`` stalls for its whole time-out over a reconnect and leaves pulls behind when it is cancelled. Here each
pull request has a reply subject of its own, so that whatever becomes of it (messages, expiry, a deleted consumer, a
server that went away) gives its unused credit back, and the credit is asked for again.

A pull outlives a connection: the server serves it again once its inbox is there. So after a reconnect the puller moves to a
new inbox, and the old one is given up before anything is asked anew; what came to it until then still counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bus.connection import Connection, Forget
from schemas.errors import PenstockError

log = structlog.get_logger()

EXPIRES_S = 10.0  # how long the server keeps a pull that nothing came for
LAPSE_GRACE_S = 2.0
RETRY_WAIT_S = 0.1
PENDING_BYTES_MAX = 256 * 1024 * 1024
JUST_EXPIRED = ("404", "408")  # any other status: the consumer or JetStream itself is gone, has changed or refuses

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
    must return quickly. One credit is one message; `grant` gives more. The server drops a pull after *expires_s* (whole
    milliseconds); it is asked again.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        stream: str,
        ensure: Ensure,
        on_message: OnMessage,
        expires_s: float = EXPIRES_S,
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._ensure = ensure
        self._on_message = on_message
        self._expires_s = expires_s
        self._inbox = ""
        self._numbers = count()
        self._pulls: dict[str, _Pull] = {}
        self._credit = 0  # granted and not asked for; less than none after messages for pulls that were given up
        self._consumer: str | None = None
        self._subscriptions: list[Subscription] = []  # the last one is ours, any others are being given up
        self._move = False
        self._refused = False
        self._wake = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._forget: Forget | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        """Raises: ApiError, BusUnavailable if the consumer can't be made."""
        self._consumer = await self._ensure()
        await self._subscribe()
        self._forget = self._connection.on_reconnect(self._rearm)
        self._runner = asyncio.create_task(self._run(), name=f"puller-{self._consumer}")

    async def stop(self) -> None:
        """Asks for nothing more, and returns when what the server had sent is handed on; it forgets the pulls."""
        if self._forget is not None:
            self._forget()
            self._forget = None
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        while self._subscriptions:
            await self._connection.settle(self._subscriptions.pop())

    def grant(self, credit: int) -> None:
        self._credit += credit
        self._wake.set()

    def renew(self) -> None:
        """Gives up the consumer and all pulls; the consumer is made again. For a reader that has to begin elsewhere."""
        self._consumer = None
        self._move = True
        self._wake.set()

    async def _rearm(self) -> None:
        """After a reconnect: the server may have lost the consumer."""
        self.renew()

    async def _run(self) -> None:
        """Turns credit into pull requests; wakes for new credit and for pulls that lapsed without a word."""
        look_at = self._loop.time() + LAPSE_GRACE_S
        while True:
            await self._woken(look_at)
            if self._loop.time() >= look_at:
                self._reclaim_lapsed()
                look_at = self._loop.time() + LAPSE_GRACE_S
            if not self._connection.is_up:
                continue
            try:
                await self._next()
            except (PenstockError, nats.errors.Error) as error:
                log.debug("pull_failed", stream=self._stream, error=type(error).__name__)
                self._refused = True
            if self._refused:
                self._refused = False
                await asyncio.sleep(RETRY_WAIT_S)
                self._wake.set()

    async def _woken(self, until: float) -> None:
        timer = self._loop.call_at(until, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
        self._wake.clear()

    async def _next(self) -> None:
        if self._move:
            self._move = False
            await self._change_inbox()
        if self._credit <= 0 or self._refused:
            return
        if self._consumer is None:
            self._consumer = await self._ensure()
        if not self._move:  # else it was lost again meanwhile
            await self._ask()

    async def _change_inbox(self) -> None:
        """Moves to a new inbox. All pulls are given up, after what had already been sent for them was handed on."""
        await self._subscribe()
        while len(self._subscriptions) > 1:
            await self._connection.settle(self._subscriptions[0])
            del self._subscriptions[0]
        left = sum(pull.left for pull in self._pulls.values())
        self._pulls.clear()
        self._credit += left

    async def _subscribe(self) -> None:
        self._inbox = self._connection.nc.new_inbox()
        subscription = await self._connection.nc.subscribe(
            f"{self._inbox}.*", cb=self._on_reply, pending_bytes_limit=PENDING_BYTES_MAX
        )
        self._subscriptions.append(subscription)

    async def _ask(self) -> None:
        number, batch = str(next(self._numbers)), self._credit
        self._pulls[number] = _Pull(batch, self._loop.time() + self._expires_s + LAPSE_GRACE_S)
        self._credit = 0
        try:
            await self._connection.nc.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
                b'{"batch":%d,"expires":%d}' % (batch, int(self._expires_s * 1000) * 1_000_000),
                reply=f"{self._inbox}.{number}",
            )
        except nats.errors.Error:
            self._credit += self._pulls.pop(number).left
            raise

    async def _on_reply(self, msg: Msg) -> None:
        number = msg.subject.rpartition(".")[2]
        pull = self._pulls.get(number)
        status = msg.headers.get("Status") if msg.headers else None
        if status is None:
            if pull is None:
                self._credit -= 1  # its pull was given up and its credit was taken back too early
            else:
                pull.left -= 1
                if pull.left == 0:
                    del self._pulls[number]
            await self._on_message(msg)
        elif status != "100" and pull is not None:
            del self._pulls[number]
            if status not in JUST_EXPIRED:
                self._consumer = None
                self._refused = True
            self.grant(pull.left)

    def _reclaim_lapsed(self) -> None:
        now = self._loop.time()
        for number in [n for n, pull in self._pulls.items() if now > pull.deadline]:
            self.grant(self._pulls.pop(number).left)
