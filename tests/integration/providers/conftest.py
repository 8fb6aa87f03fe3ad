"""The providers as the conformance suite meets them: each is a set-up, and every promise is kept by all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from schemas.ids import RouteId
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from tests.mock_provider import MockProvider
from tests.waiting import eventually
from workers.providers import make_provider
from workers.providers.base import Provider

SLOW_TOKENS_PER_S = 100


@dataclass
class SetUp:
    """*slowly* are members of a body that make the answer come at `SLOW_TOKENS_PER_S`."""

    provider: Provider
    slow: Provider
    slowly: dict[str, Any]
    mock: MockProvider | None = None

    def answering(self) -> int:
        """How many requests the far side is answering, where there is one."""
        return 0 if self.mock is None else self.mock.answering


@asynccontextmanager
async def echo() -> AsyncIterator[SetUp]:
    def make(**changes: Any) -> Provider:
        return make_provider(RouteSettings(id=RouteId("echo"), provider="echo", **changes), WorkerSettings())

    yield SetUp(provider=make(), slow=make(tokens_per_s=SLOW_TOKENS_PER_S), slowly={})


@asynccontextmanager
async def openai() -> AsyncIterator[SetUp]:
    async with MockProvider() as mock:
        provider = make_openai(mock.base_url)
        yield SetUp(provider=provider, slow=provider, slowly={"mock": {"pace_s": 1 / SLOW_TOKENS_PER_S}}, mock=mock)
        await provider.aclose()
        await eventually(lambda: mock.answering == 0 and mock.connections_open == 0, what="everything is given back")


def make_openai(base_url: str, settings: WorkerSettings | None = None, **changes: Any) -> Provider:
    models = (ModelSettings(name="m", upstream="theirs"),)
    route = RouteSettings(id=RouteId("r"), provider="openai", base_url=base_url, models=models, **changes)
    return make_provider(route, settings or WorkerSettings())


@pytest.fixture(params=[echo, openai], ids=lambda param: param.__name__)
async def setup(request: pytest.FixtureRequest) -> AsyncIterator[SetUp]:
    async with request.param() as made:
        yield made


@pytest.fixture
async def mock() -> AsyncIterator[MockProvider]:
    """A far side that the test scripts. When the test is over, every connection to it must be too."""
    async with MockProvider() as made:
        yield made
        await eventually(lambda: made.connections_open == 0, what="every connection is given back")
