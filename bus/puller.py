"""Credit-based pull: never asks a consumer for more messages than it was granted, and re-arms itself.

nats-py's ``fetch`` stalls for its whole time-out over a reconnect and leaves pulls behind when it is cancelled. Here a pull
that comes to nothing (it expired, the consumer was deleted, a server went away) gives its unused credit back, and the
credit is asked for again.

A message doesn't say which pull it answers: its subject is its own, not the inbox. So the accounts are kept in totals. What
is asked for and has not come is *asked*; a message takes one from it, and an expiry says itself how many it takes. A pull
that ended without a word would be missing from then on; so all are given up and asked anew now and then, and at once when
nothing at all was heard for longer than a pull lives.

A pull is work for the server, too. So while messages flow, credit that comes back bit by bit is not asked for bit by bit: only
when as much waits to be asked for as is asked for. The server is never without a pull while there is credit. When nothing comes
for a moment the rest is asked for as well: of a consumer that is gone, and took our pulls along, only the next pull tells.

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
REFRESH_EVERY_S = 60.0
LOOK_EVERY_S = 0.5
QUIET_S = 0.2  # nothing has come for so long: no reason to save pulls
RETRY_WAIT_S = 0.1
HEARTBEAT = "100"
UNUSED = "Nats-Pending-Messages"  # how many of a pull's messages did not come
JUST_EXPIRED = ("404", "408")  # any other status: the consumer or JetStream itself is gone, has changed or refuses

OnMessage = Callable[[Msg], None]
Ensure = Callable[[], Awaitable[str]]


class Puller:
    """Pulls from one consumer of *stream*.

    *ensure* makes the consumer when it isn't there and returns its name; *on_message* gets each message as it is read, in
    order, and must return quickly. One credit is one message; `grant` gives more. The server drops a pull after *expires_s* (whole
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
        self._credit = 0  # granted and not come
        self._asked = 0  # of these, asked for at the server
        self._heard_at = 0.0
        self._refresh_at = 0.0
        self._consumer: str | None = None
        self._subscriptions: list[Subscription] = []  # the last one is ours, any others are being given up
        self._move = False
        self._paused = False
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

    @property
    def credit(self) -> int:
        """How many messages were granted and have not come."""
        return self._credit

    def grant(self, credit: int) -> None:
        self._credit += credit
        self._wake_if_due()

    def renew(self) -> None:
        """Gives up the consumer and all pulls; the consumer is made again. For a reader that has to begin elsewhere."""
        self._consumer = None
        self._move = True
        self._wake.set()

    def pause(self) -> None:
        """Asks for nothing until `resume`; what was asked for is given up."""
        self._paused = True
        self.renew()

    def resume(self) -> None:
        self._paused = False
        self._wake.set()

    async def _rearm(self) -> None:
        """After a reconnect: the server may have lost the consumer."""
        self.renew()

    async def _run(self) -> None:
        """Turns credit into pull requests; wakes for new credit, and to see whether pulls were lost."""
        self._heard_at = self._loop.time()
        self._refresh_at = self._heard_at + REFRESH_EVERY_S
        while True:
            await self._woken(self._loop.time() + LOOK_EVERY_S)
            if not self._connection.is_up:
                continue
            self._look()
            try:
                await self._next()
            except (PenstockError, nats.errors.Error) as error:
                log.debug("pull_failed", stream=self._stream, error=type(error).__name__)
                self._refused = True
            if self._refused:
                self._refused = False
                await asyncio.sleep(RETRY_WAIT_S)
                self._wake.set()

    def _look(self) -> None:
        """Gives all pulls up when none can be alive any more, or when it is time to count anew."""
        now = self._loop.time()
        silent = self._asked > 0 and now - self._heard_at > self._expires_s + LAPSE_GRACE_S
        if silent or now > self._refresh_at:
            self._refresh_at = now + REFRESH_EVERY_S
            self._heard_at = now
            self._move = True

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
        if self._paused or self._refused or not self._is_due():
            return
        if self._consumer is None:
            self._consumer = await self._ensure()
        if not self._move:  # else it was lost again meanwhile
            await self._ask()

    def _is_due(self) -> bool:
        """Whether it is time to ask for the credit that isn't asked for."""
        unasked = self._credit - self._asked
        return unasked >= max(1, self._asked) or (unasked > 0 and self._loop.time() - self._heard_at > QUIET_S)

    def _wake_if_due(self) -> None:
        if self._is_due():
            self._wake.set()

    async def _change_inbox(self) -> None:
        """Moves to a new inbox. All pulls are given up, after what had already been sent for them was handed on."""
        await self._subscribe()
        while len(self._subscriptions) > 1:
            await self._connection.settle(self._subscriptions[0])
            del self._subscriptions[0]
        self._asked = 0

    async def _subscribe(self) -> None:
        self._inbox = self._connection.nc.new_inbox()
        self._subscriptions.append(await self._connection.hear(f"{self._inbox}.*", self._on_reply))

    async def _ask(self) -> None:
        batch = self._credit - self._asked
        if self._asked == 0:
            self._heard_at = self._loop.time()
        self._asked += batch
        try:
            await self._connection.nc.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}",
                b'{"batch":%d,"expires":%d}' % (batch, int(self._expires_s * 1000) * 1_000_000),
                reply=f"{self._inbox}.{next(self._numbers)}",
            )
        except nats.errors.Error:
            self._asked -= batch
            raise

    def _on_reply(self, msg: Msg) -> None:
        self._heard_at = self._loop.time()
        status = msg.headers.get("Status") if msg.headers else None
        if status is None:
            self._credit -= 1
            self._asked = max(0, self._asked - 1)
            self._wake_if_due()
            self._on_message(msg)
        elif not msg.subject.startswith(self._inbox):
            pass  # the last word on a pull that was given up
        elif status in JUST_EXPIRED:
            self._asked = max(0, self._asked - int((msg.headers or {}).get(UNUSED, "0")))
            self._wake.set()
        elif status != HEARTBEAT:
            self._refused = True
            self.renew()
