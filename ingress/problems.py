"""Errors as clients see them: status, OpenAI's error body, headers. The only file that writes an HTTP status of an error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from schemas import errors
from schemas.errors import Fault, PenstockError
from schemas.frames import Faulted

CLIENT_LEFT_STATUS = 499  # never sent: nobody is there to read it; nginx's number, for the ledger
RETRY_AFTER_DEFAULT_S = 1.0

_INVALID = "invalid_request_error"
_LIMIT = "rate_limit_error"
_SERVER = "server_error"

# The most specific class wins: a class that isn't here has its nearest ancestor's row.
_ROWS: dict[type[PenstockError], tuple[int, str]] = {
    PenstockError: (500, _SERVER),
    errors.RequestError: (400, _INVALID),
    errors.Unauthorized: (401, _INVALID),
    errors.Forbidden: (403, _INVALID),
    errors.NotFound: (404, _INVALID),
    errors.MethodNotAllowed: (405, _INVALID),
    errors.RequestTimeout: (408, _INVALID),
    errors.Conflict: (409, _INVALID),
    errors.AnswerNotKept: (410, _INVALID),
    errors.RequestCancelled: (410, _INVALID),
    errors.BodyTooLarge: (413, _INVALID),
    errors.IdempotencyKeyReused: (422, _INVALID),
    errors.BacklogFull: (429, _LIMIT),
    errors.ServiceError: (503, _SERVER),
    errors.QueueTimeout: (504, _SERVER),
    errors.FirstTokenTimeout: (504, _SERVER),
    errors.IdleTimeout: (504, _SERVER),
    errors.TotalTimeout: (504, _SERVER),
    errors.WorkerLost: (502, _SERVER),
    errors.FrameGap: (502, _SERVER),
    errors.Fault: (502, _SERVER),
    errors.ProviderRejected: (400, _INVALID),
    errors.ProviderRateLimited: (429, _LIMIT),
    errors.ProviderTimeout: (504, _SERVER),
}

_RETRY_LATER = (errors.BacklogFull, errors.ServiceError, errors.ProviderRateLimited)

_FAULT_CLASSES: list[type[Fault]] = [Fault, *Fault.__subclasses__()]
_FAULTS = {cls.code: cls for cls in _FAULT_CLASSES}


@dataclass(frozen=True, slots=True)
class Problem:
    """An error on its way to a client."""

    status: int
    code: str
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


def problem_of(error: PenstockError) -> Problem:
    status, type_ = _row(type(error))
    code = error.code
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if isinstance(error, errors.ProviderRejected):
        # The provider's verdict on the request itself is the client's business, word for word.
        status = error.status if error.status is not None and 400 <= error.status < 500 else status
        type_ = error.type or type_
        code = error.upstream_code or code
    if isinstance(error, _RETRY_LATER):
        wait_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_DEFAULT_S
        headers = ((b"retry-after", str(math.ceil(wait_s)).encode()),)
    if isinstance(error, errors.Unauthorized):
        headers = ((b"www-authenticate", b"Bearer"),)
    return Problem(status, code, error_body(error.message, type_=type_, param=error.param, code=code), headers)


def fault_of(frame: Faulted) -> Fault:
    """The fault that a worker told of."""
    return _FAULTS.get(frame.code, Fault)(
        frame.message,
        status=frame.status,
        type_=frame.type,
        param=frame.param,
        upstream_code=frame.upstream_code,
        retry_after_s=frame.retry_after_s,
    )


def error_body(message: str, *, type_: str, param: str | None, code: str | None) -> bytes:
    """OpenAI's error shape."""
    return msgspec.json.encode({"error": {"message": message, "type": type_, "param": param, "code": code}})


def _row(cls: type[PenstockError]) -> tuple[int, str]:
    for ancestor in cls.__mro__:
        if row := _ROWS.get(ancestor):
            return row
    raise AssertionError(cls)  # PenstockError is in the table
