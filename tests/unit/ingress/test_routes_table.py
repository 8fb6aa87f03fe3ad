"""What `penstock routes` prints of a route's keys, limits and health."""

from __future__ import annotations

import msgspec
import pytest

from ingress.cli import _health, _key, _rates
from schemas.standing import Health, KeyStanding, KeyState, Rates


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (KeyStanding(label="env:A"), "env:A ready"),
        (KeyStanding(label="env:A", requests_left=7, tokens_left=900), "env:A ready (7 requests and 900 tokens left)"),
        (KeyStanding(label="#2", state=KeyState.COOLING, reason="HTTP 429", for_s=11.6), "#2 cooling for 12 s"),
        (
            KeyStanding(label="file:/run/k", state=KeyState.DEAD, reason="refused (HTTP 401)", for_s=3.0),
            "file:/run/k dead: refused (HTTP 401)",
        ),
    ],
)
def test_a_key_is_told_in_a_few_words(key: KeyStanding, told: str) -> None:
    assert _key(msgspec.to_builtins(key)) == told


def test_the_last_minute_is_told_beside_its_limits() -> None:
    rates = Rates(requests=12, requests_per_minute=60, tokens=900)
    assert _rates(msgspec.to_builtins(rates)) == "12 of 60 requests, 900 tokens"
    assert _rates(None) is None


def test_health_is_told_in_percent_and_milliseconds() -> None:
    assert (
        _health(msgspec.to_builtins(Health(error_rate=0.021, first_token_ms=340)))
        == "2% errors, 340 ms to the first token"
    )
    assert _health(msgspec.to_builtins(Health())) == "0% errors"
    assert _health(None) is None
