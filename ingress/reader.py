"""A client that is told what a transcript has, and what it gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from starlette.types import Receive, Scope, Send

from ingress.protocol import cut_of
from ingress.sse import KEEP_ALIVE
from ingress.stopping import uncancel
from ingress.transcript import Transcript
from schemas.errors import AnswerNotKept


class Client(NamedTuple):
    """One HTTP request, as ASGI has it."""

    scope: Scope
    receive: Receive
    send: Send

    @property
    def cut(self) -> Callable[[], None]:
        """Ends its connection now."""
        return cut_of(self.scope.get("state", {}))


class Source(Protocol):
    """What a client reads from."""

    near: bool  # what is told is made in this process
    gone: bool  # the client has left
    told_status: bool  # the client was
    untold: bytes  # what was read and could not be sent yet

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> list[tuple[bytes, bytes]]: ...

    async def listen(self, receive: Receive) -> None:
        """Returns when its client has left."""

    async def begun(self) -> bool:
        """Waits for the answer to begin. False if the client leaves first. Raises: AnswerNotKept if it ends without."""

    async def next(self) -> bytes:
        """What comes next, a comment while nothing does; empty at the end, or when the client has gone.

        Raises: AnswerNotKept if what comes next had to be forgotten before it was read.
        """

    def close(self) -> None: ...


async def follow(reader: Source, client: Client, *, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Sends *client* what *reader* reads, with further *headers*, until the end or until it leaves; closes the reader.

    One that reads so slowly that what comes next is not kept any more is cut off.
    """
    listener = asyncio.create_task(reader.listen(client.receive))
    try:
        try:
            await _tell(reader, client.send, headers)
        except asyncio.CancelledError:
            # The process stops and will wait no longer. An exchange here is told so, too, and has a last word for its readers.
            uncancel()
            if not reader.near:
                raise AnswerNotKept from None
            await _tell(reader, client.send, headers)
    except AnswerNotKept:
        client.cut()
    finally:
        listener.cancel()
        reader.close()


async def _tell(reader: Source, send: Send, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Sends all there is. After having been cancelled it may be called again. Raises: AnswerNotKept."""
    if not await reader.begun():
        return
    if not reader.told_status:
        told = reader.headers
        further = [header for header in headers if header not in told]
        await send({"type": "http.response.start", "status": reader.status, "headers": [*told, *further]})
        reader.told_status = True
    while body := reader.untold or await reader.next():
        reader.untold = body
        await send({"type": "http.response.body", "body": body, "more_body": True})
        reader.untold = b""
    if not reader.gone:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Reader:
    """One client that reads a transcript from event *after* + 1 on, at its own pace."""

    near = True

    def __init__(self, transcript: Transcript, *, after: int) -> None:
        self.transcript = transcript
        self.after = after
        self.gone = False
        self.told_status = False
        self.untold = b""
        self._pulses = transcript.pulses
        transcript.attach()
        if transcript.on_reader is not None:
            transcript.on_reader()
            transcript.on_reader = None

    @property
    def status(self) -> int:
        return self.transcript.status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self.transcript.headers

    async def listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.transcript.wake()

    async def begun(self) -> bool:
        while not self.transcript.status and not self.gone:
            if self.transcript.ended:
                raise AnswerNotKept
            await self.transcript.waiter()
        return not self.gone

    async def next(self) -> bytes:
        transcript = self.transcript
        while not self.gone:
            body, self.after = transcript.read(self.after)
            if body:
                return body
            if transcript.ended:
                break
            if transcript.pulses != self._pulses:
                self._pulses = transcript.pulses
                return KEEP_ALIVE
            await transcript.waiter()
        return b""

    def close(self) -> None:
        self.transcript.detach()
        if self.transcript.ended and self.transcript.attached == 0:
            self.transcript.settle()
