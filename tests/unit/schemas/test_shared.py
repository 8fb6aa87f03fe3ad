"""What one of several workers may take of a route's limits."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import SetupError
from schemas.ids import RouteId
from schemas.routes import shared
from schemas.settings import RouteSettings, load

LIMITS = st.integers(min_value=1, max_value=10**9)


def route(**members: object) -> RouteSettings:
    return msgspec.structs.replace(RouteSettings(id=RouteId("r"), provider="openai"), **members)


@given(requests=LIMITS, tokens=LIMITS, workers=st.integers(min_value=2, max_value=64))
def test_together_they_take_no_more_than_it_states_and_waste_less_than_one_each(
    requests: int, tokens: int, workers: int
) -> None:
    stated = route(requests_per_minute=requests, tokens_per_minute=tokens)
    if min(requests, tokens) < workers:
        with pytest.raises(SetupError, match=r"can't be shared by \d+ workers"):
            shared(stated, workers)
        return
    part = shared(stated, workers)
    for limit, its_part in ((requests, part.requests_per_minute), (tokens, part.tokens_per_minute)):
        assert limit - workers < workers * its_part <= limit


@pytest.mark.parametrize(("at_once", "part"), [(None, None), (8, 4), (5, 2), (1, 1)])
def test_each_has_one_attempt_at_once_at_least_and_no_limit_stays_none(at_once: int | None, part: int | None) -> None:
    found = shared(route(max_concurrency=at_once), 2)
    assert (found.max_concurrency, found.requests_per_minute, found.tokens_per_minute) == (part, 0, 0)


@pytest.mark.parametrize("provider", ["vllm", "echo"])
def test_what_each_worker_runs_itself_is_not_shared(provider: str) -> None:
    own = route(provider=provider, max_concurrency=8)
    assert shared(own, 2) == own
    assert shared(route(requests_per_minute=1), 1) == route(requests_per_minute=1)


def test_fewer_than_one_worker_share_nothing() -> None:
    with pytest.raises(SetupError, match="limits_shared_by must be at least 1"):
        load(None, {"PENSTOCK_WORKER_LIMITS_SHARED_BY": "0"})
