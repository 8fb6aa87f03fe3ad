"""Each error has one status and OpenAI's shape; the tree in schemas/errors.py says the same as the table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import msgspec
import pytest

from ingress.problems import fault_of, problem_of
from schemas import errors
from schemas.errors import Fault, PenstockError, SetupError
from schemas.frames import Faulted

TYPES = {"invalid_request_error", "rate_limit_error", "server_error"}


def _all(cls: type[PenstockError]) -> Iterator[type[PenstockError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _all(child)


ERRORS = [cls for cls in _all(PenstockError) if not issubclass(cls, SetupError)]
FAULTS = [cls for cls in ERRORS if issubclass(cls, Fault)]


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_has_a_status_a_type_a_message_and_its_code(cls: type[PenstockError]) -> None:
    problem = problem_of(cls())
    told = msgspec.json.decode(problem.body)
    assert set(told) == {"error"}
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert 400 <= problem.status < 600
    assert told["error"]["type"] in TYPES
    assert told["error"]["code"] == cls.code == problem.code
    assert told["error"]["message"].rstrip().endswith((".", "'"))
    assert (told["error"]["type"] == "server_error") is (problem.status >= 500)


def test_the_statuses_are_those_that_the_tree_draws() -> None:
    drawn = dict(re.findall(r"── (\w+) +(\d{3})  ", inspect.getdoc(errors) or ""))
    assert len(drawn) > 20
    for name, status in drawn.items():
        assert problem_of(getattr(errors, name)()).status == int(status), name


def test_codes_are_of_one_error_each() -> None:
    leaves = [cls for cls in ERRORS if cls not in (errors.RequestError, errors.ServiceError, Fault)]
    codes = [cls.code for cls in leaves]
    assert sorted({code for code in codes if codes.count(code) > 1}) == []


@pytest.mark.parametrize("cls", [errors.BacklogFull, errors.NoLiveRoute, errors.Overloaded, errors.ProviderRateLimited])
def test_what_passes_by_itself_says_when_to_retry(cls: type[PenstockError]) -> None:
    assert dict(problem_of(cls()).headers)[b"retry-after"] == b"1"


def test_when_to_retry_is_whole_seconds_rounded_up() -> None:
    problem = problem_of(errors.ProviderRateLimited(retry_after_s=6.2))
    assert dict(problem.headers)[b"retry-after"] == b"7"


def test_a_providers_verdict_on_the_request_is_passed_on_word_for_word() -> None:
    rejected = errors.ProviderRejected(
        "too long", status=422, type_="their_type", param="messages", upstream_code="context_length_exceeded"
    )
    problem = problem_of(rejected)
    assert problem.status == 422
    assert msgspec.json.decode(problem.body)["error"] == {
        "message": "too long",
        "type": "their_type",
        "param": "messages",
        "code": "context_length_exceeded",
    }


@pytest.mark.parametrize("status", [None, 200, 302, 500, 999])
def test_a_verdict_with_a_status_that_is_none_is_a_400(status: int | None) -> None:
    assert problem_of(errors.ProviderRejected("no", status=status)).status == 400


@pytest.mark.parametrize("cls", FAULTS)
def test_a_fault_arrives_as_what_it_was(cls: type[Fault]) -> None:
    frame = Faulted(
        request_id="r",  # type: ignore[arg-type]
        epoch=1,
        seq=1,
        code=cls.code,
        message="m",
        status=418,
        type="t",
        param="p",
        upstream_code="u",
        retry_after_s=2.5,
    )
    fault = fault_of(frame)
    assert fault.code == cls.code
    assert isinstance(fault, cls) or cls.code == Fault.code
    assert (fault.message, fault.status, fault.type, fault.param) == ("m", 418, "t", "p")
    assert (fault.upstream_code, fault.retry_after_s) == ("u", 2.5)


def test_a_fault_of_a_newer_worker_is_a_fault() -> None:
    frame = Faulted(request_id="r", epoch=1, seq=1, code="from_the_future", message="m")  # type: ignore[arg-type]
    assert type(fault_of(frame)) is Fault
    assert problem_of(fault_of(frame)).status == 502
