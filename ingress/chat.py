"""POST /v1/chat/completions: from the body to an exchange, or to a clear refusal."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog
from starlette.types import Receive, Scope, Send

from bus.control import ControlFeed
from bus.log import FENCED
from ingress.answer import Answer, Headers, Line, StreamedAnswer, WholeAnswer, end_body, send_problem
from ingress.auth import authenticate
from ingress.books import RECORD_FAILURE_WAIT_S, Arrival, Books
from ingress.exchange import Exchange, Services
from ingress.policy.waits import Waits, asked
from ingress.problems import CLIENT_LEFT_STATUS, Problem, problem_of
from ingress.reader import Client
from ingress.replay import NO_WISH, Replays, Wish, wish_of
from ingress.sse import EventWriter
from ingress.stopping import uncancel
from ingress.transcript import Transcript
from schemas.chat import ChatRequest, decode_request, for_providers
from schemas.control import KeyStated
from schemas.errors import (
    BodyTooLarge,
    LogUnavailable,
    MethodNotAllowed,
    NoAllowedRoute,
    Overloaded,
    PenstockError,
    QueueUnavailable,
    RequestTimeout,
    Stopping,
)
from schemas.events import LeftOutLeg, RequestRejected
from schemas.ids import EventId, OrgId, RequestId, RouteId, new_id
from schemas.settings import IngressSettings

log = structlog.get_logger()

DRAIN_S = 2.0
MODEL_SHOWN_CHARS = 256  # of a model name in an event: whoever asks for a longer one asks for none of ours


class ClientLeftError(PenstockError):
    """The client closed the connection before its request was complete."""

    code = "client_left"


@dataclass(slots=True)
class Visit:
    """What is known of a request before it is accepted or refused."""

    arrival: Arrival
    principal: KeyStated | None = None
    request: ChatRequest | None = None
    body: bytes = b""
    held_bytes: int = 0  # of the body, as far as it has come
    wish: Wish = NO_WISH


class ChatCompletions:
    """The endpoint, as a plain ASGI application."""

    def __init__(self, services: Services, *, control: ControlFeed, settings: IngressSettings) -> None:
        self._services = services
        self._control = control
        self._settings = settings
        self._running = 0
        self._held_bytes = 0  # bodies of all requests under way
        self.replays = Replays(services, control, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._running += 1
        visit = Visit(Arrival(RequestId(new_id()), time.monotonic(), time.time_ns()))
        try:
            try:
                admitted = await self._admit(visit, scope, receive)
            except PenstockError as error:
                await self._reject(error, visit, receive, send)
            except Exception:
                # A defect of ours costs one request, and is told in the API's shape like every other error.
                log.exception("admission_broke", request_id=visit.arrival.request_id)
                await self._reject(PenstockError(), visit, receive, send)
            else:
                await self._serve(admitted, visit, Client(scope, receive, send))
        finally:
            self._running -= 1
            self._held_bytes -= visit.held_bytes

    async def _serve(self, admitted: Exchange | Transcript, visit: Visit, client: Client) -> None:
        match admitted:
            case Transcript():
                await self.replays.tell_again(admitted, after=visit.wish.after or 0, client=client)
            case Exchange():
                answer = partial(_answer, admitted.books)
                hold_on = partial(self._hold_on, visit)
                await self.replays.serve(
                    admitted, answer, visit.wish, body=visit.body, client=client, on_lasting=hold_on
                )

    def _hold_on(self, visit: Visit) -> Callable[[], None]:
        """*visit*'s body is held beyond its client's stay, until what this returns is called."""
        held, visit.held_bytes = visit.held_bytes, 0

        def let_go() -> None:
            self._held_bytes -= held

        return let_go

    async def _admit(self, visit: Visit, scope: Scope, receive: Receive) -> Exchange | Transcript:
        """The exchange for a request that may be served, or what is said already to the same one; *visit* is told what is known of it.

        Raises: PenstockError that says why it may not.
        """
        if scope["method"] != "POST":
            raise MethodNotAllowed("Send a POST request with a JSON body.")
        if max(self._running, self.replays.running + 1) > self._settings.max_concurrent_requests:
            raise Overloaded
        principal = authenticate(scope["headers"], self._control.state, now_ns=visit.arrival.ns)
        visit.principal = principal
        waits = Waits(
            default=self._services.timeouts,
            most=self._settings.timeouts_max,
            key=principal.timeouts,
            own=asked(scope["headers"]),
        )
        body = await self._read_body(visit, scope, receive)
        visit.body = body
        visit.request = request = decode_request(body)
        visit.wish = wish = wish_of(scope["headers"], resume_s=self._settings.resume_s)
        if (earlier := await self.replays.earlier(wish, principal, body)) is not None:
            return earlier
        if not self._services.queue.is_up:
            raise QueueUnavailable
        if self._services.log.fenced:
            raise LogUnavailable(FENCED)
        plan = self._services.router.plan(request, principal, body)
        books = Books(
            self._services.log,
            visit.arrival,
            request,
            body_bytes=len(body),
            principal=principal,
            plan=plan,
            prompt_hash=prompt_hash(principal.org, request.messages_raw),
        )
        ours = request.provider is not None or request.models is not None
        return Exchange(self._services, books, body=for_providers(body) if ours else body, waits=waits)

    async def _read_body(self, visit: Visit, scope: Scope, receive: Receive) -> bytes:
        """Raises: BodyTooLarge, RequestTimeout, Overloaded, ClientLeftError, Stopping."""
        limit = self._settings.max_body_bytes
        if _content_length(scope["headers"]) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeftError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
                    visit.held_bytes += len(parts[-1])
                    self._held_bytes += len(parts[-1])
                    if self._held_bytes > self._settings.max_held_bytes:
                        raise Overloaded("The requests under way are too large together. Retry shortly.")
                    if not message.get("more_body", False):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError as error:
            raise RequestTimeout(
                f"The request body did not arrive within {self._settings.body_timeout_s:g} s."
            ) from error
        except asyncio.CancelledError:  # the process stops
            uncancel()
            raise Stopping from None

    async def _reject(self, error: PenstockError, visit: Visit, receive: Receive, send: Send) -> None:
        """Records why, then says why."""
        problem = problem_of(error)
        left = isinstance(error, ClientLeftError)
        principal, request = visit.principal, visit.request
        event = RequestRejected(
            id=EventId(new_id()),
            ts_ns=time.time_ns(),
            org=None if principal is None else principal.org,
            request_id=visit.arrival.request_id,
            producer=self._services.log.producer,
            key_id=None if principal is None else principal.key_id,
            model=None if request is None else request.model[:MODEL_SHOWN_CHARS],
            code=error.code,
            http_status=CLIENT_LEFT_STATUS if left else problem.status,
            stream=request is not None and request.stream,
            body_bytes=len(visit.body),
            left_out=_left_out(error),
        )
        try:
            await self._services.refusals.record(event, within_s=RECORD_FAILURE_WAIT_S)
        except LogUnavailable as unavailable:
            log.error(
                "rejection_not_recorded_in_time",
                request_id=visit.arrival.request_id,
                code=error.code,
                error=unavailable.message,
            )
        except asyncio.CancelledError:  # the process stops, and the log has the event but can't be reached
            uncancel()
        if not left:
            await self._tell(error, problem, visit, receive, send)

    async def _tell(self, error: PenstockError, problem: Problem, visit: Visit, receive: Receive, send: Send) -> None:
        headers: Headers = [(b"x-request-id", visit.arrival.request_id.encode())]
        match error:
            case BodyTooLarge():
                await send_problem(send, problem, [*headers, (b"connection", b"close")], more=True)
                await _drain(receive)
                await end_body(send)
            case RequestTimeout() | Stopping():
                await send_problem(send, problem, [*headers, (b"connection", b"close")])
            case MethodNotAllowed():
                await send_problem(send, problem, [*headers, (b"allow", b"POST")])
            case _:
                await send_problem(send, problem, headers)


async def _drain(receive: Receive) -> None:
    """Reads what still comes of a body that is refused, for `DRAIN_S` at most.

    To close with something unread resets the connection, and a client that is still writing would never read why.
    """
    try:
        async with asyncio.timeout(DRAIN_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    except TimeoutError:
        pass
    except asyncio.CancelledError:  # the process stops
        uncancel()


def _left_out(error: PenstockError) -> tuple[LeftOutLeg, ...]:
    """The places that the request could have gone to, had it allowed one."""
    if not isinstance(error, NoAllowedRoute):
        return ()
    return tuple(LeftOutLeg(route=RouteId(route), model=model, why=why) for route, model, why in error.left_out)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is over the limit of {limit} bytes.")


def prompt_hash(org: OrgId, messages: bytes) -> str:
    """SHA-256 over the org and the messages as sent: the same prompt of two orgs can't be told to be the same."""
    return hashlib.sha256(org.encode() + b"\0" + messages).hexdigest()


def _answer(books: Books, send: Send, line: Line) -> Answer:
    arrival = books.arrival
    request = books.request
    created = arrival.ns // 1_000_000_000

    def headers() -> Headers:
        tried = [(b"x-penstock-tried", books.tried.encode())] if books.tried else []
        return [
            (b"x-request-id", arrival.request_id.encode()),
            (b"x-penstock-route", books.leg.route.encode("latin-1", "replace")),
            (b"x-penstock-attempts", str(books.attempts).encode()),
            *tried,
            (b"x-penstock-cache", b"off"),
            (b"x-penstock-overhead-ms", b"%.2f" % (books.overhead_us / 1000)),
        ]

    if not request.stream:
        return WholeAnswer(
            send, arrival.request_id, created=created, model=lambda: books.leg.model, headers=headers, line=line
        )

    def writer() -> EventWriter:
        return EventWriter(
            arrival.request_id,
            created=created,
            model=books.leg.model,
            include_usage=request.include_usage,
            obfuscate=request.include_obfuscation,
        )

    return StreamedAnswer(send, writer, headers=headers, include_usage=request.include_usage, line=line)


def _content_length(headers: list[tuple[bytes, bytes]]) -> int:
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
