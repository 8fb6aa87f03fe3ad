"""JetStream publishing with as little work a message as there can be: one inbox for all answers, one future each.

nats-py's own ``js.publish`` costs a timer and a header map for each message; this is on the path of every request.
"""

from __future__ import annotations

import asyncio
from itertools import count

import nats.errors

from bus.connection import BusUnavailable, Connection, Forget, Message, MessageTooLarge, api_answer
from schemas.errors import PenstockError

SWEEP_EVERY_S = 0.25
HEADER_LINE_BYTES = len("NATS/1.0\r\n\r\n")


class Publisher:
    """Publishes to streams and resolves each message's acknowledgement."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox = ""
        self._numbers = count()
        self._waiting: dict[str, tuple[asyncio.Future[int], float]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._forget: Forget | None = None
        self._loop = asyncio.get_running_loop()

    async def start(self) -> None:
        inbox = self._connection.nc.new_inbox()
        await self._connection.hear(f"{inbox}.*", self._on_answer)
        self._inbox = inbox
        self._forget = self._connection.on_disconnect(self._fail_all)
        self._sweeper = asyncio.create_task(self._sweep(), name="publisher-sweep")

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        if self._forget is not None:
            self._forget()
        self._fail_all()

    async def publish(
        self, subject: str, payload: bytes, *, timeout_s: float, headers: dict[str, str] | None = None
    ) -> int:
        """The message's sequence number in its stream, once the stream has stored it.

        Raises: ApiError if the stream refuses it, MessageTooLarge if the server would, BusUnavailable if there is no answer
        in time or the connection is lost: then it may have been stored all the same, or may still be, and publishing again
        needs the same ``Nats-Msg-Id``.
        """
        if len(payload) + _size(headers) > self._connection.max_payload:
            raise MessageTooLarge(f"the message is larger than NATS takes ({self._connection.max_payload} bytes)")
        if not self._connection.is_up:
            raise BusUnavailable
        number = str(next(self._numbers))
        future: asyncio.Future[int] = self._loop.create_future()
        self._waiting[number] = (future, self._loop.time() + timeout_s)
        try:
            await self._connection.nc.publish(subject, payload, reply=f"{self._inbox}.{number}", headers=headers)
            return await future
        except nats.errors.Error as error:
            raise BusUnavailable(f"NATS took no message: {type(error).__name__}") from error
        finally:
            self._waiting.pop(number, None)

    def _on_answer(self, msg: Message) -> None:
        future, _ = self._waiting.get(msg.subject.rpartition(".")[2], (None, 0.0))
        if future is None or future.done():
            return
        if not msg.data:  # no responders: JetStream isn't there, or not yet
            future.set_exception(BusUnavailable("no stream answers"))
            return
        try:
            future.set_result(api_answer(msg.data)["seq"])
        except PenstockError as error:
            future.set_exception(error)
        except LookupError:
            future.set_exception(BusUnavailable("an answer is not JetStream's"))

    def _fail_all(self) -> None:
        """Their answers went to a connection that is gone: those who wait may try again at once."""
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(BusUnavailable("the connection to NATS was lost before the answer came"))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = self._loop.time()
            for future, deadline in list(self._waiting.values()):
                if now > deadline and not future.done():
                    future.set_exception(BusUnavailable("the stream gave no answer in time"))


def _size(headers: dict[str, str] | None) -> int:
    """What *headers* take on the wire: ``Name: value`` and a line's end for each."""
    if headers is None:
        return 0
    return HEADER_LINE_BYTES + sum(len(name) + len(value) + 4 for name, value in headers.items())
