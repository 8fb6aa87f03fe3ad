"""The client's side of an exchange: one answer, streamed or whole, over ASGI."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from msgspec import Raw
from starlette.types import Send

from ingress.problems import Problem
from ingress.sse import KEEP_ALIVE, EventWriter, whole_body
from ingress.transcript import EVENT
from schemas.ids import RequestId

Headers = list[tuple[bytes, bytes]]
MakeHeaders = Callable[[], Headers]
MakeWriter = Callable[[], EventWriter]  # asked once, with the first content: by then it is known which model answers


class Answer(Protocol):
    """What is delivered to one client.

    *began*: the status has been sent, so an error can only be told inside the body. *delivered*: content has been sent.
    """

    began: bool
    delivered: bool

    async def deliver(self, chunks: Sequence[Raw]) -> None: ...

    async def keep_alive(self) -> None: ...

    async def finish(self, chunks: Sequence[Raw], usage: bytes) -> None: ...

    async def fail(self, problem: Problem) -> None: ...

    def cut(self) -> None:
        """Ends the connection without another word."""

    def lose(self) -> None:
        """The same, and whoever asks for the answer again isn't told either: nobody knows how it ended."""


class Line(NamedTuple):
    """What an answer ends with instead of an end: see `Answer`."""

    cut: Callable[[], None]
    lose: Callable[[], None]


class StreamedAnswer:
    """Server-sent events, exactly as the API writes them."""

    def __init__(
        self, send: Send, make_writer: MakeWriter, *, headers: MakeHeaders, include_usage: bool, line: Line
    ) -> None:
        self.began = False
        self.delivered = False
        self._send = send
        self._make_writer = make_writer
        self._made_writer: EventWriter | None = None
        self._headers = headers
        self._include_usage = include_usage
        self.cut, self.lose = line

    async def deliver(self, chunks: Sequence[Raw]) -> None:
        await self._write(self._events(chunks))

    async def keep_alive(self) -> None:
        await self._write([KEEP_ALIVE])

    async def finish(self, chunks: Sequence[Raw], usage: bytes) -> None:
        events = self._events(chunks)
        if self._include_usage:
            events.append(self._writer.usage_event(usage))
        events.append(self._writer.done_event())
        await self._write(events, more=False)

    async def fail(self, problem: Problem) -> None:
        """Before the first byte as a plain error; after it inside the stream, which then ends without ``[DONE]``."""
        if self.began:
            await self._write([self._writer.error_event(problem.body)], more=False)
        else:
            self.began = True
            await send_problem(self._send, problem, self._headers())

    @property
    def _writer(self) -> EventWriter:
        if self._made_writer is None:
            self._made_writer = self._make_writer()
        return self._made_writer

    def _events(self, chunks: Sequence[Raw]) -> list[bytes]:
        if not chunks:
            return []
        self.delivered = True
        writer = self._writer
        return [writer.event(bytes(chunk)) for chunk in chunks]

    async def _write(self, parts: Iterable[bytes], *, more: bool = True) -> None:
        if not self.began:
            self.began = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
                *self._headers(),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        number = 0 if self._made_writer is None else self._made_writer.number
        body = b"".join(parts)
        await self._send({"type": "http.response.body", "body": body, "more_body": more, EVENT: number})


class WholeAnswer:
    """One JSON body."""

    def __init__(
        self,
        send: Send,
        request_id: RequestId,
        *,
        created: int,
        model: Callable[[], str],
        headers: MakeHeaders,
        line: Line,
    ) -> None:
        self.began = False
        self.delivered = False
        self._send = send
        self._request_id = request_id
        self._created = created
        self._model = model
        self._headers = headers
        self._members: Raw | None = None
        self.cut, self.lose = line

    async def deliver(self, chunks: Sequence[Raw]) -> None:
        if chunks:
            self._members = chunks[-1]

    async def keep_alive(self) -> None:
        """There is nothing that could be sent before the body."""

    async def finish(self, chunks: Sequence[Raw], usage: bytes) -> None:
        await self.deliver(chunks)
        members = b"{}" if self._members is None else bytes(self._members)
        body = whole_body(self._request_id, created=self._created, model=self._model(), members=members, usage=usage)
        self.began = self.delivered = True
        await send_body(self._send, 200, body, self._headers())

    async def fail(self, problem: Problem) -> None:
        self.began = True
        await send_problem(self._send, problem, self._headers())


async def send_problem(send: Send, problem: Problem, headers: Headers, *, more: bool = False) -> None:
    await send_body(send, problem.status, problem.body, [*headers, *problem.headers], more=more)


async def send_body(send: Send, status: int, body: bytes, headers: Headers, *, more: bool = False) -> None:
    """All of *body*; with *more*, its end as HTTP sees it is still to come: `end_body`."""
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def end_body(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})
