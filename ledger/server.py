"""The ledger's HTTP: POST /v1/sql for analysts, and whether it is alive and ready."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ledger.problems import problem
from ledger.query import Queries
from ledger.render import Format, Rendered
from ledger.writer import Writer
from schemas import codec
from schemas.control import ControlState, KeyStated, Role
from schemas.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    PenstockError,
    RequestTimeout,
    Unauthorized,
)

log = structlog.get_logger()

BODY_MAX_BYTES = 1024 * 1024
BODY_TIMEOUT_S = 10.0
CATCH_UP_S = 2.0  # how long a query waits for events that are durable and not stored yet
ANALYSTS = frozenset({Role.ANALYST, Role.ADMIN})
TRUNCATED_HEADER = "x-penstock-truncated"
ROWS_HEADER = "x-penstock-rows"


class SqlRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/sql. *params* stand for the ``?`` in *sql*, in order."""

    sql: str
    params: list[Any] = []
    format: Format = Format.JSON


_decode = msgspec.json.Decoder(SqlRequest).decode


def build_app(writer: Writer, queries: Queries, *, now_ns: Callable[[], int] = time.time_ns) -> Starlette:
    async def sql(request: Request) -> Response:
        key = authorized(request.headers.get("authorization"), writer.control, now_ns=now_ns())
        asked = await _body(request)
        began = time.monotonic()
        await writer.catch_up(within_s=CATCH_UP_S)
        result = await _while_client_waits(request, queries.run(asked.sql, asked.params, asked.format))
        if result is None:
            return Response(status_code=499)  # nobody is there to read it
        took_ms = (time.monotonic() - began) * 1000
        log.info(
            "sql_answered", key_id=key.key_id, rows=result.rows, truncated=result.truncated, took_ms=round(took_ms, 1)
        )
        headers = {TRUNCATED_HEADER: "true" if result.truncated else "false", ROWS_HEADER: str(result.rows)}
        return Response(result.body, headers=headers, media_type=result.media_type)

    async def healthz(_: Request) -> Response:
        return _json(200, {"status": "ok"})

    async def readyz(_: Request) -> Response:
        try:
            pending = await writer.pending()
        except PenstockError as error:
            return _json(503, {"ready": False, "reason": error.message})
        logs = {
            name: {"position": cursor.last_position, "stream_seq": cursor.last_seq, "pending": pending[name]}
            for name, cursor in writer.cursors.items()
        }
        return _json(
            200 if writer.caught_up else 503, {"ready": writer.caught_up, "logs": logs, "queries": queries.running}
        )

    routes = [
        Route("/v1/sql", sql, methods=["POST"]),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={
            PenstockError: _on_error,
            404: _answer_with(NotFound),
            405: _answer_with(MethodNotAllowed),
            Exception: _on_bug,
        },
    )


def authorized(header: str | None, control: ControlState, *, now_ns: int) -> KeyStated:
    """The key in *header*, if it may read the ledger.

    Raises: Unauthorized, Forbidden.
    """
    scheme, _, secret = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized
    key = control.key_of(hashlib.sha256(secret.strip().encode()).hexdigest(), now_ns=now_ns)
    if key is None:
        raise Unauthorized
    if key.role not in ANALYSTS:
        raise Forbidden("This key's role does not reach the ledger: a key of role analyst or admin does.")
    return key


async def _body(request: Request) -> SqlRequest:
    """Raises: BodyTooLarge, RequestTimeout, BadRequest."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_MAX_BYTES:
                    raise BodyTooLarge(f"The request body is over the limit of {BODY_MAX_BYTES} bytes.")
    except TimeoutError as error:
        raise RequestTimeout from error
    except ClientDisconnect as error:
        raise BadRequest("The client left before its request was complete.") from error
    try:
        return _decode(bytes(body))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(
            f'The body must be {{"sql": "SELECT …", "params": […], "format": "json|csv|arrow|parquet"}}: {error}'
        ) from error


async def _while_client_waits(request: Request, work: Awaitable[Rendered]) -> Rendered | None:
    """The result of *work*, or None if the client left first; then the work is given up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_client_left(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for part in (task, gone):
            part.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PenstockError)  # noqa: S101 - what it is registered for
    log.info("request_refused", path=request.url.path, code=error.code)
    return problem(error)


async def _on_bug(_: Request, __: Exception) -> Response:
    return problem(PenstockError())  # uvicorn logs the traceback


def _answer_with(cls: type[PenstockError]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, __: Exception) -> Response:
        return problem(cls())

    return answer


def _json(status: int, body: object) -> Response:
    return Response(codec.encode(body), status, media_type="application/json")
