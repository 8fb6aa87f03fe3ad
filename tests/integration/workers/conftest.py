"""Workers that are closed when the test ends, and must have all their slots back by then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from bus.connection import Connection
from bus.publisher import Publisher
from bus.server import EmbeddedServer
from tests.integration.workers.rig import Desk, Station, open_station

Hire = Callable[..., Awaitable[Station]]


@pytest.fixture
async def desk(connection: Connection, publisher: Publisher) -> Desk:
    made = Desk(connection, publisher)
    await made.start()
    return made


@pytest.fixture
async def hire(nats_server: EmbeddedServer, connection: Connection) -> AsyncIterator[Hire]:
    """Starts a worker, as `open_station` does; whatever happens to it, no slot may leak."""
    stations: list[Station] = []

    async def make(*, url: str = nats_server.url, **wanted: Any) -> Station:
        stations.append(await open_station(url, **wanted))
        return stations[-1]

    yield make
    for station in stations:
        station.worker._settings = type(station.worker._settings)(drain_s=0.0)
        await station.close()
    for station in stations:
        assert station.idle, f"{station.route.slots - station.route.free} slots leaked"
        assert not station.provider.running
