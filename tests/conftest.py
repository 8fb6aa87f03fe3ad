"""What every test may ask for: a NATS server of its own, connections to it, things as they are made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus.connection import Connection, connect
from bus.publisher import Publisher
from bus.server import EmbeddedServer
from bus.streams import ensure_streams
from schemas.settings import NatsSettings
from tests.ports import free_port


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A real nats-server on a free port; it starts in 15 ms and dies with the test."""
    server = EmbeddedServer(tmp_path / "nats")
    server._port = free_port()  # many tests have it killed and started again on the same port
    async with server:
        yield server


@pytest.fixture
async def connection(nats_server: EmbeddedServer) -> AsyncIterator[Connection]:
    """A connection, with the streams made."""
    made = await connect(nats_server.url, name="test")
    await ensure_streams(made, NatsSettings())
    yield made
    await made.close()


@pytest.fixture
async def publisher(connection: Connection) -> AsyncIterator[Publisher]:
    made = Publisher(connection)
    await made.start()
    yield made
    await made.stop()
