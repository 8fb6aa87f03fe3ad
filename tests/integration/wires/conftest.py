from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from schemas.ids import RouteId
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from tests.waiting import eventually
from tests.wire_servers import AnthropicServer, GeminiServer, WireServer
from workers.providers import make_provider
from workers.providers.base import Provider


class Wire:
    """A provider with its own wire, and the server behind it."""

    def __init__(self, name: str, server: WireServer) -> None:
        self.name = name
        self.server = server
        self.made: list[Provider] = []

    def provider(self, settings: WorkerSettings | None = None, **changes: Any) -> Provider:
        route = RouteSettings(
            **{
                "id": RouteId("r"),
                "provider": self.name,
                "base_url": self.server.base_url,
                "api_keys": ("env:WIRE_KEY",),
                "models": (ModelSettings(name="m", upstream="theirs"),),
                **changes,
            }
        )
        self.made.append(make_provider(route, settings or WorkerSettings(tries=1)))
        return self.made[-1]


@pytest.fixture(params=[("anthropic", AnthropicServer), ("google", GeminiServer)], ids=lambda param: param[0])
async def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    """When the test is over, every connection to the server must be too."""
    monkeypatch.setenv("WIRE_KEY", "sk-wire")
    name, make = request.param
    async with make() as server:
        wire = Wire(name, server)
        yield wire
        for provider in wire.made:
            await provider.aclose()
        await eventually(lambda: server.connections == 0, what="every connection is given back")
