"""The error tree: as drawn, with codes that clients and queries may rely on."""

from __future__ import annotations

import re

import pytest

from schemas import errors
from schemas.errors import Fault, PenstockError

# What clients match on and what is in stored events. A code may be added here, never changed.
CODES = {
    "PenstockError": "internal_error",
    "RequestError": "invalid_request",
    "BadRequest": "invalid_request",
    "Unauthorized": "invalid_api_key",
    "Forbidden": "insufficient_permissions",
    "NotFound": "not_found",
    "ModelNotFound": "model_not_found",
    "NoAllowedRoute": "no_allowed_route",
    "AnswerNotFound": "answer_not_found",
    "AnswerNotKept": "answer_not_kept",
    "RequestCancelled": "request_cancelled",
    "IdempotencyKeyReused": "idempotency_key_reused",
    "MethodNotAllowed": "method_not_allowed",
    "RequestTimeout": "request_timeout",
    "BodyTooLarge": "body_too_large",
    "Conflict": "conflict",
    "BacklogFull": "backlog_full",
    "ServiceError": "service_unavailable",
    "NoLiveRoute": "no_live_route",
    "Overloaded": "overloaded",
    "Stopping": "stopping",
    "QueueUnavailable": "queue_unavailable",
    "LogUnavailable": "log_unavailable",
    "QueueTimeout": "queue_timeout",
    "FirstTokenTimeout": "first_token_timeout",
    "IdleTimeout": "idle_timeout",
    "TotalTimeout": "total_timeout",
    "WorkerLost": "worker_lost",
    "WorkerStalled": "worker_stalled",
    "WorkerYielded": "worker_yielded",
    "FrameGap": "frame_gap",
    "Fault": "upstream_error",
    "ProviderRejected": "upstream_rejected",
    "ProviderAuth": "upstream_auth",
    "ProviderRateLimited": "upstream_rate_limited",
    "ProviderUnreachable": "upstream_unreachable",
    "ProviderTimeout": "upstream_timeout",
    "ProviderFailed": "upstream_error",
    "ProviderNonsense": "upstream_invalid_response",
    "NotContinued": "not_continued",
    "SetupError": "setup_error",
}

CLASSES = {name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, PenstockError)}


def drawn_parents() -> dict[str, str]:
    """Child to parent, read from the drawing in the module's docstring."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"((?:│   |    )*(?:├── |└── )?)(\w+)(?:\s{2,}|$)", line):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            if depth:
                parents[found[2]] = path[depth - 1]
    return parents


def test_the_tree_is_as_it_is_drawn() -> None:
    drawn = drawn_parents()
    real = {name: cls.__mro__[1].__name__ for name, cls in CLASSES.items() if cls is not PenstockError}
    assert drawn == {name: parent for name, parent in real.items() if name != "ModelNotFound"}


def test_the_codes_are_those_that_were_promised() -> None:
    promised = {name: CLASSES[name].code for name in CODES}
    assert promised == CODES
    assert set(CLASSES) == set(CODES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_an_error_without_words_says_what_its_class_says(name: str) -> None:
    error = CLASSES[name]()
    assert error.message == str(error) == CLASSES[name].__doc__
    assert error.message
    assert error.param is None


def test_an_error_keeps_its_words_and_the_parameter() -> None:
    error = errors.BadRequest("no", param="n")
    assert (error.message, str(error), error.param) == ("no", "no", "n")


def test_a_fault_keeps_what_the_provider_said() -> None:
    fault = errors.ProviderRateLimited(
        "later", status=429, type_="requests", param="p", upstream_code="rate", retry_after_s=1.5
    )
    assert (fault.message, fault.status, fault.type, fault.param) == ("later", 429, "requests", "p")
    assert (fault.upstream_code, fault.retry_after_s, fault.code) == ("rate", 1.5, "upstream_rate_limited")
    assert isinstance(fault, Fault)
