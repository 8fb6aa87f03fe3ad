"""What can go wrong with a query, and every error as a status and a body in OpenAI's shape.

The only file of the ledger that writes the HTTP status of an error.
"""

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


# The most specific class wins: a class that isn't here has its nearest ancestor's status.
_STATUS: dict[type[PenstockError], int] = {
    PenstockError: 500,
    RequestError: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    MethodNotAllowed: 405,
    RequestTimeout: 408,
    BodyTooLarge: 413,
    TooManyQueries: 429,
    ServiceError: 503,
    SqlTimeout: 504,
}


def status_of(error: PenstockError) -> int:
    return next(_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS)


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
