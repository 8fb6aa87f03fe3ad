"""The table of what is tried again."""

from __future__ import annotations

import pytest

from schemas.errors import (
    Fault,
    ProviderAuth,
    ProviderFailed,
    ProviderNonsense,
    ProviderRateLimited,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnreachable,
)
from workers.providers.openai_faults import Complaint, refusal
from workers.providers.retries import TRIES_MAX, Tries, Verdict, dead_reason, is_unwell, verdict


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, Verdict.FINAL) for status in (400, 404, 409, 413, 415, 422, 418, 301)),
        *((status, Verdict.KILL) for status in (401, 402, 403)),
        (429, Verdict.COOL),
        *((status, Verdict.RETRY) for status in (500, 502, 503, 504, 529, 408)),
    ],
)
def test_what_a_status_means_for_the_next_try(status: int, expected: Verdict) -> None:
    assert verdict(refusal(status, Complaint(message="no", stated=True))) is expected


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (ProviderUnreachable(), Verdict.RETRY),
        (ProviderFailed(), Verdict.RETRY),
        (ProviderTimeout(), Verdict.FINAL),
        (ProviderNonsense(), Verdict.FINAL),
        (ProviderFailed(status=404), Verdict.FINAL),
        (ProviderRateLimited(status=429, upstream_code="insufficient_quota"), Verdict.KILL),
        (ProviderRateLimited(status=429, upstream_code="rate_limit_exceeded"), Verdict.COOL),
        (Fault(), Verdict.FINAL),
    ],
)
def test_what_a_fault_without_a_status_means(fault: Fault, expected: Verdict) -> None:
    assert verdict(fault) is expected


def tries(*, keys: int = 1, failures_max: int = 3, dice: float = 0.5) -> Tries:
    return Tries(0.0, until=100.0, keys=keys, failures_max=failures_max, dice=lambda: dice)


def test_a_failing_provider_is_asked_so_often_with_a_growing_pause() -> None:
    found = tries(failures_max=4)
    assert [found.pause_s(Verdict.RETRY) for _ in range(4)] == [0.2, 0.4, 0.8, None]


def test_a_pause_has_jitter() -> None:
    assert [tries(dice=dice).pause_s(Verdict.RETRY) for dice in (0.0, 0.5, 1.0)] == [0.1, 0.2, pytest.approx(0.3)]


def test_a_refused_key_is_followed_by_the_next_one_at_once() -> None:
    found = tries(keys=30)
    assert [found.pause_s(Verdict.KILL) for _ in range(30)] == [0.0] * 30


def test_a_limited_key_is_followed_by_the_next_one_at_once_and_from_then_on_after_a_pause() -> None:
    """A second key that is limited too shares its account with the first, probably."""
    found = tries(keys=3, failures_max=2)
    assert [found.pause_s(Verdict.COOL) for _ in range(4)] == [0.0, 0.2, 0.4, None]


def test_what_would_only_be_said_again_is_not_asked_again() -> None:
    assert tries().pause_s(Verdict.FINAL) is None


def test_the_tries_are_bounded_whatever_ends_them() -> None:
    found = tries(keys=10**6)
    found.count = TRIES_MAX
    assert found.pause_s(Verdict.KILL) is None


@pytest.mark.parametrize("fault", [ProviderUnreachable(), ProviderFailed(status=500), ProviderNonsense()])
def test_what_counts_against_a_providers_health(fault: Fault) -> None:
    assert is_unwell(fault, waited_s=0.0, patience_s=9.0)


@pytest.mark.parametrize("fault", [ProviderRejected(status=400), ProviderAuth(status=401), ProviderRateLimited()])
def test_what_does_not(fault: Fault) -> None:
    assert not is_unwell(fault, waited_s=100.0, patience_s=9.0)


def test_a_time_out_counts_only_where_the_provider_had_its_time() -> None:
    """Else a client in a hurry could take a route down for everybody."""
    assert not is_unwell(ProviderTimeout(), waited_s=0.5, patience_s=9.0)
    assert is_unwell(ProviderTimeout(), waited_s=10.0, patience_s=9.0)
    assert is_unwell(ProviderTimeout(status=504), waited_s=0.5, patience_s=9.0)


def test_why_a_key_is_dead_is_said_without_the_providers_words() -> None:
    assert dead_reason(ProviderAuth("Incorrect API key sk-123", status=401)) == "refused (HTTP 401)"
    assert dead_reason(ProviderAuth("sk-123")) == "refused"
    assert dead_reason(ProviderRateLimited("sk-123", status=429)) == "no quota left (HTTP 429)"
