"""Retries and broken connections: a client is told what it, or its first try, was told already, and what comes after it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

import structlog
from starlette.types import Message, Receive, Scope, Send

from bus.control import ControlFeed
from ingress.answer import Answer, Line
from ingress.archive import Archive, Claim
from ingress.auth import Principal, authenticate
from ingress.books import Books
from ingress.elsewhere import Elsewhere, mirror
from ingress.exchange import Exchange, OnUnserved, Services
from ingress.neighbours import FarReader
from ingress.problems import problem_of
from ingress.protocol import tasks_of
from ingress.reader import Client, Reader, follow
from ingress.stopping import uncancel
from ingress.transcript import Owner, Transcript
from schemas.errors import (
    AnswerNotFound,
    BadRequest,
    LogUnavailable,
    MethodNotAllowed,
    PenstockError,
    QueueUnavailable,
    Stopping,
)
from schemas.events import RequestReplayed
from schemas.ids import EventId, RequestId, new_id, request_id_of
from schemas.settings import IngressSettings

log = structlog.get_logger()

KEY_CHARS_MAX = 255
LOOKS_MAX = 3  # at ingresses that went away before they had told anything
EVENT_DIGITS_MAX = 15
REPLAYED = (b"x-penstock-replayed", b"true")

MakeAnswer = Callable[[Send, Line], Answer]


class Wish(NamedTuple):
    """What a request's headers say of retries and broken connections."""

    key: str | None = None  # Idempotency-Key
    grace_s: float | None = None  # x-penstock-resume
    after: int | None = None  # Last-Event-ID

    @property
    def lasting(self) -> bool:
        """Whether the request shall go on without its client."""
        return self.key is not None or self.grace_s is not None


NO_WISH = Wish()


def wish_of(headers: list[tuple[bytes, bytes]], *, resume_s: float) -> Wish:
    """Raises: BadRequest that names the header."""
    wish = NO_WISH
    for name, value in headers:
        match name:
            case b"idempotency-key":
                wish = wish._replace(key=_key(value))
            case b"x-penstock-resume":
                wish = wish._replace(grace_s=_seconds(value, resume_s))
            case b"last-event-id" if value:
                wish = wish._replace(after=_number(value))
    return wish


class Replays:
    """What the chat endpoint does so that answers can be read again."""

    def __init__(self, services: Services, control: ControlFeed, settings: IngressSettings) -> None:
        self.archive = Archive(settings)
        self._neighbours = neighbours = services.neighbours
        self._elsewhere: Elsewhere | None = None
        if neighbours is not None and services.claims is not None:
            neighbours.tell_of(self.archive)
            ttl_s = settings.idempotency_s + services.timeouts.total_s
            self._elsewhere = Elsewhere(services.claims, neighbours, ingress=services.ingress, ttl_s=ttl_s)
        self.running = 0  # requests that go on without their clients if need be
        self._tasks: set[asyncio.Future[None]] = set()
        self._log = services.log
        self._control = control
        self._resume_s = settings.resume_s

    async def earlier(self, wish: Wish, principal: Principal, body: bytes) -> Transcript | None:
        """The answer to an earlier try of the same request, which may still be on its way.

        Raises: IdempotencyKeyReused, AnswerNotKept, AnswerNotFound, BadRequest, LogUnavailable, Stopping.
        """
        if wish.key is None:
            if wish.after is not None:
                raise BadRequest(
                    "Last-Event-ID continues a request with an Idempotency-Key; without one, send it with "
                    "GET /v1/chat/completions/{id of the completion or of the request}."
                )
            return None
        transcript = await self._claimed(Claim(_owner(principal), wish.key), body)
        if transcript is not None:
            after = wish.after or 0
            transcript.check(after)
            running = not transcript.ended
            self._note(transcript.request_id, principal, by="idempotency_key", after=after, running=running)
        elif wish.after is not None:
            raise AnswerNotFound
        return transcript

    async def serve(
        self,
        exchange: Exchange,
        make_answer: MakeAnswer,
        wish: Wish,
        *,
        body: bytes,
        client: Client,
        on_lasting: Callable[[], Callable[[], None]],
    ) -> None:
        """Runs *exchange* for *client*, and keeps what that is told.

        *on_lasting* is called if the exchange may outlive its client, and what it returns when the exchange is over.
        """
        books = exchange.books
        request_id, owner = books.arrival.request_id, _owner(books.principal)
        if wish.lasting:
            grace_s = self._resume_s if wish.grace_s is None else wish.grace_s
            if wish.key is None:
                transcript = self.archive.open(request_id, owner, grace_s=grace_s)
                work = self._run(exchange, make_answer, transcript)
            else:
                claim = Claim(owner, wish.key)
                transcript = self.archive.claim(request_id, claim, body=body, grace_s=grace_s)
                work = self._run_once(exchange, make_answer, transcript, claim=claim, body=body)
            reader = Reader(transcript, after=0)
            on_over = on_lasting()
            self._spawn(work, client).add_done_callback(lambda _: on_over())
            await follow(reader, client)
        elif books.request.stream and (unasked := self.archive.open_unasked(request_id, owner)) is not None:
            await self._run_attached(exchange, make_answer, unasked, client)
        else:
            await exchange.run(make_answer(client.send, Line(client.cut, client.cut)), client.receive)

    async def tell_again(self, transcript: Transcript, *, after: int, client: Client) -> None:
        await follow(Reader(transcript, after=after), client, headers=[REPLAYED])

    async def resume(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/chat/completions/{id}, as an ASGI application. Raises: PenstockError, before anything is sent."""
        if scope["method"] != "GET":
            raise MethodNotAllowed("Send a GET request, with Last-Event-ID to continue after that event.")
        principal = authenticate(scope["headers"], self._control.state, now_ns=time.time_ns())
        after = wish_of(scope["headers"], resume_s=self._resume_s).after or 0
        try:
            request_id = request_id_of(scope["path_params"]["completion_id"])
        except ValueError as error:
            raise AnswerNotFound from error
        reader = await self._find(principal, request_id, after=after)
        await follow(reader, Client(scope, receive, send), headers=[REPLAYED])

    async def _find(self, principal: Principal, request_id: RequestId, *, after: int) -> Reader | FarReader:
        """Raises: AnswerNotFound, AnswerNotKept, BadRequest, LogUnavailable, QueueUnavailable."""
        owner = _owner(principal)
        try:
            transcript = self.archive.find(owner, request_id)
        except AnswerNotFound:
            if self._neighbours is None:
                raise
            far = await self._neighbours.find(owner, request_id, after=after)
            self._note(request_id, principal, by="last_event_id", after=after, running=far.running)
            return far
        transcript.check(after)
        self._note(request_id, principal, by="last_event_id", after=after, running=not transcript.ended)
        return Reader(transcript, after=after)

    async def _claimed(self, claim: Claim, body: bytes) -> Transcript | None:
        """What *claim* is for. A request that is being cancelled is waited for, as its key may be free then.

        Raises: IdempotencyKeyReused, Stopping.
        """
        transcript = self.archive.find_claim(claim, body=body)
        if transcript is None or not transcript.is_deserted:
            return transcript
        try:
            await transcript.over()
        except asyncio.CancelledError:  # the process stops
            uncancel()
            raise Stopping from None
        return self.archive.find_claim(claim, body=body)

    async def _run(
        self,
        exchange: Exchange,
        make_answer: MakeAnswer,
        transcript: Transcript,
        *,
        on_unserved: OnUnserved | None = None,
    ) -> None:
        """Runs *exchange* for whoever is attached to *transcript*."""
        self.running += 1
        answer = make_answer(transcript.send, Line(transcript.cancel, transcript.lose))
        try:
            await exchange.run(answer, transcript.deserted, on_unserved=on_unserved)
        finally:
            self.running -= 1
            self.archive.settle(transcript, served=exchange.books.served)

    async def _run_once(
        self, exchange: Exchange, make_answer: MakeAnswer, transcript: Transcript, *, claim: Claim, body: bytes
    ) -> None:
        """The same, unless another ingress runs it, or has run it: then *transcript* gets what that one tells."""
        request_id = transcript.request_id
        refusal: PenstockError | None = None
        told = True
        try:
            told = await self._told_elsewhere(exchange.books, transcript, claim=claim, body=body)
        except PenstockError as error:
            refusal = error.with_traceback(None)
        except asyncio.CancelledError:  # the process stops
            uncancel()
            if transcript.status:  # the end of what another one tells is known there
                transcript.lose()
            else:
                refusal = Stopping()
        if refusal is not None:
            with contextlib.suppress(LogUnavailable):
                exchange.books.note_refused(refusal)
            await make_answer(transcript.send, Line(transcript.cancel, transcript.lose)).fail(problem_of(refusal))
        if told:
            self.archive.settle(transcript, served=False)  # it is the other one's, who tells it again if need be
            return
        free = None if self._elsewhere is None else partial(self._elsewhere.give_back, claim, request_id, body)
        await self._run(exchange, make_answer, transcript, on_unserved=free)

    async def _told_elsewhere(self, books: Books, transcript: Transcript, *, claim: Claim, body: bytes) -> bool:
        """Whether *transcript* was told by another ingress, as far as that went.

        Raises: IdempotencyKeyReused, AnswerNotKept, QueueUnavailable, LogUnavailable.
        """
        if self._elsewhere is None:
            return False
        for _ in range(LOOKS_MAX):
            far = await self._elsewhere.look(claim, transcript.request_id, body)
            if far is None:
                return False
            self._note(far.request_id, books.principal, by="idempotency_key", after=0, running=far.running)
            if await mirror(far, transcript, header=REPLAYED):
                return True
        raise QueueUnavailable

    async def _run_attached(
        self, exchange: Exchange, make_answer: MakeAnswer, transcript: Transcript, client: Client
    ) -> None:
        """Runs *exchange* for the one client that asked, as long as it is there, and for those that take its place."""
        cut = client.cut

        async def tell(message: Message) -> None:
            transcript.take(message)
            await client.send(message)

        async def leaving() -> Message:
            message = await client.receive()
            if message["type"] != "http.disconnect":
                return message
            transcript.detach()
            return await transcript.deserted()

        def end() -> None:
            cut()
            transcript.cancel()

        def lose() -> None:
            cut()
            transcript.lose()

        transcript.attach()
        transcript.on_reader = cut  # or the exchange would go on waiting for a connection that nobody reads any more
        try:
            await exchange.run(make_answer(tell, Line(end, lose)), leaving)
        finally:
            transcript.on_reader = None
            self.archive.settle(transcript)

    def _spawn(self, work: Awaitable[None], client: Client) -> asyncio.Future[None]:
        """Runs *work* as the server's own requests run: a drain waits for it."""
        task = asyncio.ensure_future(work)
        for tasks in (self._tasks, tasks_of(client.scope.get("state", {}))):
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return task

    def _note(self, request_id: RequestId, principal: Principal, *, by: str, after: int, running: bool) -> None:
        """Raises: LogUnavailable."""
        self._log.note(
            RequestReplayed(
                id=EventId(new_id()),
                ts_ns=time.time_ns(),
                org=principal.org,
                request_id=request_id,
                producer=self._log.producer,
                key_id=principal.key_id,
                by=by,
                running=running,
                after=after,
            )
        )


def _owner(principal: Principal) -> Owner:
    return Owner(principal.org, principal.key_id)


def _key(value: bytes) -> str:
    if not 0 < len(value) <= KEY_CHARS_MAX or not value.isascii() or not value.decode().isprintable():
        raise BadRequest(f"Invalid Idempotency-Key: expected 1 to {KEY_CHARS_MAX} printable ASCII characters.")
    return value.decode()


def _seconds(value: bytes, most: float) -> float:
    text = value.decode("latin-1").strip()
    if not text.isdecimal() or not text.isascii() or len(text) > EVENT_DIGITS_MAX or int(text) > most:
        raise BadRequest(f"Invalid x-penstock-resume: expected whole seconds, {most:g} at most.")
    return float(text)


def _number(value: bytes) -> int:
    text = value.decode("latin-1").strip()
    if not text.isdecimal() or not text.isascii() or len(text) > EVENT_DIGITS_MAX:
        raise BadRequest("Invalid Last-Event-ID: expected the id of an event of the stream, a whole number.")
    return int(text)
