from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.providers import RATE_LIMITS
from workers.providers.rate_headers import RESET_MAX_S, Told, reset_s, told_requests, told_tokens

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12ms", 0.012),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("2m59.56s", 179.56),
        ("1h2m3s", 3723.0),
        ("17", 17.0),
        ("0.5", 0.5),
        ("2026-11-21T12:00:42Z", 42.0),
        ("2026-11-21T13:00:42+01:00", 42.0),
        ("2026-11-21T12:00:42", 42.0),
        (str(int(NOW.timestamp()) + 9), 9.0),
        (str((int(NOW.timestamp()) + 9) * 1000), 9.0),
        ("2026-11-21T11:00:00Z", 0.0),
        ("99999999", RESET_MAX_S),
        ("10d", RESET_MAX_S),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("1s and a bit", None),
        (None, None),
    ],
)
def test_a_reset_is_told_in_many_ways(text: str | None, seconds: float | None) -> None:
    found = reset_s(text, now=NOW)
    assert found == (None if seconds is None else pytest.approx(seconds))


@given(text=st.text(max_size=40))
def test_whatever_a_reset_says_it_is_a_sane_number_or_none(text: str) -> None:
    found = reset_s(text, now=NOW)
    assert found is None or 0.0 <= found <= RESET_MAX_S


def test_openais_headers() -> None:
    headers = {
        "x-ratelimit-limit-requests": "5000",
        "x-ratelimit-remaining-requests": "4999",
        "x-ratelimit-reset-requests": "12ms",
        "x-ratelimit-limit-tokens": "160000",
        "x-ratelimit-remaining-tokens": "159976",
        "x-ratelimit-reset-tokens": "9ms",
    }
    assert told_requests(headers, RATE_LIMITS["openai"], now=NOW) == Told(5000, 4999, 0.012)
    assert told_tokens(headers, RATE_LIMITS["openai"], now=NOW) == Told(160_000, 159_976, pytest.approx(0.009))


def test_anthropics_headers() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "1000",
        "anthropic-ratelimit-requests-remaining": "999",
        "anthropic-ratelimit-requests-reset": "2026-11-21T12:00:01Z",
        "anthropic-ratelimit-tokens-limit": "96000",
        "anthropic-ratelimit-tokens-remaining": "96000",
        "anthropic-ratelimit-tokens-reset": "2026-11-21T12:00:00Z",
    }
    assert told_requests(headers, RATE_LIMITS["anthropic"], now=NOW) == Told(1000, 999, 1.0)
    assert told_tokens(headers, RATE_LIMITS["anthropic"], now=NOW) == Told(96_000, 96_000, 0.0)


@pytest.mark.parametrize("value", ["", "many", "-1", "inf"])
def test_what_is_no_count_is_not_told(value: str) -> None:
    headers = {"x-ratelimit-remaining-requests": value}
    assert told_requests(headers, RATE_LIMITS["openai"], now=NOW) == Told()


def test_a_limit_of_nothing_is_none() -> None:
    headers = {"x-ratelimit-limit-requests": "0", "x-ratelimit-remaining-requests": "0"}
    assert told_requests(headers, RATE_LIMITS["openai"], now=NOW) == Told()


def test_a_provider_without_such_headers_tells_nothing() -> None:
    headers = {"x-ratelimit-remaining-requests": "0"}
    assert told_requests(headers, RATE_LIMITS["unknown"], now=NOW) == Told()
