"""A connection to a server that has no streams yet."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from bus.connection import Connection, connect
from bus.server import EmbeddedServer


@pytest.fixture
async def bare(nats_server: EmbeddedServer) -> AsyncIterator[Connection]:
    made = await connect(nats_server.url, name="bare")
    yield made
    await made.close()
