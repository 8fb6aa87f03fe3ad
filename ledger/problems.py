"""What can go wrong with a query, and every error as a status and a body in OpenAI's shape; the ledger's only file that writes a status."""

from __future__ import annotations

import structlog
from starlette.responses import Response

from schemas import codec
from schemas.errors import (
    BodyTooLarge,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    PenstockError,
    RequestError,
    RequestTimeout,
    ServiceError,
    Unauthorized,
)

log = structlog.get_logger()

RETRY_AFTER_S = 1


class SqlError(RequestError):
    """The SQL is not valid."""

    code = "sql_error"


class SqlRefused(RequestError):
    """This SQL may not run here."""

    code = "sql_refused"


class SqlOutOfMemory(RequestError):
    """The query needs more memory than the ledger gives to queries."""

    code = "sql_out_of_memory"


class ResultTooLarge(RequestError):
    """One row of the result is over the limit of bytes."""

    code = "sql_result_too_large"


class SqlTimeout(ServiceError):
    """The query took longer than the limit."""

    code = "sql_timeout"


class TooManyQueries(RequestError):
    """As many queries as this ledger runs at once are running. Retry shortly."""

    code = "too_many_queries"


def status_of(error: PenstockError) -> int:
    match error:
        case Unauthorized():
            return 401
        case Forbidden():
            return 403
        case NotFound():
            return 404
        case MethodNotAllowed():
            return 405
        case RequestTimeout():
            return 408
        case BodyTooLarge():
            return 413
        case TooManyQueries():
            return 429
        case RequestError():
            return 400
        case SqlTimeout():
            return 504
        case ServiceError():
            return 503
        case _:
            return 500


def problem(error: PenstockError) -> Response:
    """*error* as its HTTP answer."""
    status = status_of(error)
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_S)
    body = {
        "error": {
            "message": error.message if status != 500 else "The ledger failed. Its log says why.",
            "type": _type_of(status),
            "param": error.param,
            "code": error.code,
        }
    }
    return Response(codec.encode(body), status, headers, media_type="application/json")


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
