"""What `penstock routes` shows of a model server's own numbers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ingress.cli import _engine
from schemas.jobs import EngineStats


def told(**numbers: Any) -> str | None:
    return _engine(msgspec.structs.asdict(EngineStats(**numbers)))


def test_a_route_without_numbers_shows_none() -> None:
    assert _engine(None) is None


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({}, "3 running, 1 waiting"),
        ({"cache_used": 0.254}, "3 running, 1 waiting, cache 25% full"),
        ({"prefix_asked": 200, "prefix_found": 50}, "3 running, 1 waiting, 25% of prompts from cache"),
        ({"prefix_asked": 0, "prefix_found": 0}, "3 running, 1 waiting"),
        ({"prefix_asked": 200}, "3 running, 1 waiting"),
    ],
)
def test_what_is_known_is_shown(numbers: dict[str, Any], words: str) -> None:
    assert told(running=3, waiting=1, **numbers) == words
