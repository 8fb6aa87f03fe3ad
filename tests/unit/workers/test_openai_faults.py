from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import (
    Fault,
    ProviderAuth,
    ProviderFailed,
    ProviderNonsense,
    ProviderRateLimited,
    ProviderRejected,
    ProviderTimeout,
)
from workers.providers.openai_faults import (
    MESSAGE_CHARS_MAX,
    RETRY_AFTER_MAX_S,
    Complaint,
    complaint,
    refusal,
    retry_after_s,
)

SAID = Complaint(message="of org-secret", type="t", param="p", code="c", stated=True)


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        *((status, ProviderRejected) for status in (400, 404, 409, 413, 415, 422)),
        *((status, ProviderAuth) for status in (401, 402, 403)),
        *((status, ProviderTimeout) for status in (408, 504)),
        (429, ProviderRateLimited),
        *((status, ProviderFailed) for status in (500, 502, 503, 529, 599, 405, 410, 418, 301, 302, 307)),
        *((status, ProviderNonsense) for status in (201, 204)),
    ],
)
def test_status_tells_the_fault(status: int, fault: type[Fault]) -> None:
    made = refusal(status, SAID, retry_after_s=2.0)
    assert type(made) is fault
    assert made.status == status


@pytest.mark.parametrize("status", [401, 402, 403, 429, 500, 503, 504, 302])
def test_words_of_the_provider_stay_with_us_unless_it_refuses_the_request(status: int) -> None:
    assert "org-secret" not in refusal(status, SAID).message


def test_a_rejection_keeps_what_the_provider_said() -> None:
    made = refusal(400, SAID)
    assert (made.message, made.type, made.param, made.upstream_code) == ("of org-secret", "t", "p", "c")


def test_404_without_an_error_body_is_a_wrong_address_and_not_the_clients_fault() -> None:
    assert type(refusal(404, complaint(b"<html>nginx</html>"))) is ProviderFailed
    assert type(refusal(404, complaint(b'{"detail":"Not Found"}'))) is ProviderFailed
    assert type(refusal(404, complaint(b'{"error":{"message":"no such model"}}'))) is ProviderRejected


@pytest.mark.parametrize(
    ("body", "message", "status"),
    [
        (b'{"error":{"message":"m","type":"t","param":null,"code":"c"}}', "m", None),
        (b'{"error":{"message":"m","code":422}}', "m", 422),
        (b'{"error":"m"}', "m", None),
        (b'{"object":"error","message":"m","type":"BadRequestError","code":400}', "m", 400),
        (b'"m"', "m", None),
        (b'{"error":{"message":{"not":"text"}}}', None, None),
        (b"<html>", None, None),
        (b"", None, None),
        (b"[" * 10_000, None, None),
        (b'{"error":{"message":"\xff"}}', None, None),
    ],
)
def test_complaints_are_read_in_all_their_shapes(body: bytes, message: str | None, status: int | None) -> None:
    said = complaint(body)
    assert (said.message, said.status) == (message, status)


@pytest.mark.parametrize("shape", [b"[%b]", b"%b"])  # Google's compatible endpoint, and its own wire
def test_a_400_that_names_the_key_is_about_the_key_and_not_about_the_request(shape: bytes) -> None:
    """It was passed on as the client's mistake, and the key was used for the next request again."""
    body = b"""{"error":{"code":400,"message":"API key not valid. Please pass a valid API key.","status":"INVALID_ARGUMENT",
        "details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"%b"}]}}"""
    fault = refusal(400, complaint(shape % (body % b"API_KEY_INVALID")))
    assert (type(fault), fault.status) == (ProviderAuth, 400)
    assert type(refusal(400, complaint(shape % (body % b"BAD_VALUE")))) is ProviderRejected


def test_a_long_message_is_cut() -> None:
    assert len(complaint(b'{"error":"' + b"x" * 9999 + b'"}').message or "") == MESSAGE_CHARS_MAX


NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "1e9"}, RETRY_AFTER_MAX_S),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
    ],
)
def test_retry_after_is_seconds_milliseconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, now=NOW) == seconds


@given(st.text(max_size=40))
def test_retry_after_never_fails(text: str) -> None:
    seconds = retry_after_s({"retry-after": text}, now=NOW)
    assert seconds is None or 0 <= seconds <= RETRY_AFTER_MAX_S
