"""What an error of an OpenAI-compatible server means here: by its status and type, never by its text; pure.

Only a refusal of the request itself keeps the provider's words: the client can mend it, and needs them. All others may
name accounts, projects and machines that are not the client's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from schemas.errors import (
    Fault,
    ProviderAuth,
    ProviderFailed,
    ProviderNonsense,
    ProviderRateLimited,
    ProviderRejected,
    ProviderTimeout,
)

MESSAGE_CHARS_MAX = 2000
RETRY_AFTER_MAX_S = 24 * 3600.0

_STATUS_BY_NAME = {  # an error inside an HTTP 200 has no status of its own, but a type or a code
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "bad_request_error": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "authenticationerror": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "permissiondeniederror": 403,
    "not_found_error": 404,
    "notfounderror": 404,
    "model_not_found": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "ratelimiterror": 429,
    "timeout_error": 504,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Complaint:
    """What a provider's error body says, as far as it is one."""

    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | None = None
    status: int | None = None  # that it states itself
    stated: bool = False  # it is an error body at all
    key_refused: bool = False  # Google says so with a 400, and with a reason among the details


def complaint(body: bytes) -> Complaint:
    """The complaint in an error body of any of the common shapes: ``{"error": {…}}``, ``{"error": "…"}``, ``{"message": …}``.

    Google's compatible endpoint has a list around it.
    """
    try:
        return complaint_of(msgspec.json.decode(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Complaint()


def complaint_of(found: Any) -> Complaint:
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, str):
        return Complaint(message=_text(error), stated=True)
    if not isinstance(error, dict):
        return Complaint()
    code = error.get("code")
    return Complaint(
        message=_text(error.get("message")),
        type=_text(error.get("type")),
        param=_text(error.get("param")),
        code=_text(code),
        status=_status(code) or _status(error.get("status")) or _status(error.get("status_code")),
        stated="message" in error,
        key_refused=_refuses_key(error.get("details")),
    )


def refusal(status: int, said: Complaint, *, retry_after_s: float | None = None) -> Fault:
    """The fault that an answer with this HTTP *status*, which isn't 200, is."""
    if status == 404 and not said.stated:
        return ProviderFailed("The provider has nothing at the configured address (HTTP 404).", status=404)
    if said.key_refused:
        return ProviderAuth(status=status)
    fault: Fault
    match status:
        case 400 | 404 | 409 | 413 | 415 | 422:
            message = said.message or f"The provider rejected the request (HTTP {status})."
            fault = ProviderRejected(message, status=status, type_=said.type, param=said.param, upstream_code=said.code)
        case 401 | 402 | 403:
            fault = ProviderAuth(status=status)
        case 408 | 504:
            fault = ProviderTimeout(f"The provider itself ran out of time (HTTP {status}).", status=status)
        case 429:
            fault = ProviderRateLimited(status=status, upstream_code=said.code, retry_after_s=retry_after_s)
        case _ if 200 <= status < 300:
            fault = ProviderNonsense(f"The provider answered with HTTP {status}.", status=status)
        case _ if 300 <= status < 400:
            fault = ProviderFailed(f"The provider sent us elsewhere (HTTP {status}), where we don't go.", status=status)
        case _:
            fault = ProviderFailed(f"The provider failed (HTTP {status}).", status=status)
    return fault


def refusal_inside(said: Complaint) -> Fault:
    """The fault that an error inside an HTTP 200 is: by the status it states, else by its type and code."""
    status = said.status
    for name in (said.code, said.type):
        if status is None and name is not None:
            status = _STATUS_BY_NAME.get(name.lower())
    if status is None or not 400 <= status < 600:
        return ProviderFailed("The provider failed in the middle of its answer.", status=status)
    return refusal(status, said)


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Seconds to wait, from ``retry-after-ms``, or ``retry-after`` in seconds or as a date; at most `RETRY_AFTER_MAX_S`."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return _bounded(milliseconds / 1000)
    stated = headers.get("retry-after")
    seconds = _number(stated)
    if seconds is not None:
        return _bounded(seconds)
    try:
        at = parsedate_to_datetime(stated or "")
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return _bounded((at - (now or datetime.now(UTC))).total_seconds())


def _refuses_key(details: Any) -> bool:
    return isinstance(details, list) and any(
        isinstance(detail, dict) and detail.get("reason") == "API_KEY_INVALID" for detail in details
    )


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value)[:MESSAGE_CHARS_MAX]


def _status(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) == 3:
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 100 else None
