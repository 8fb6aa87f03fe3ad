from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bus.connection import Connection
from bus.server import EmbeddedServer
from tests.integration.continuation.rig import Rig


@pytest.fixture
async def rig(nats_server: EmbeddedServer, connection: Connection, tmp_path: Path) -> AsyncIterator[Rig]:
    """An ingress and no worker yet."""
    made = Rig(nats_server, connection, tmp_path)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def two(rig: Rig) -> Rig:
    await rig.add_worker("worker-a")
    await rig.add_worker("worker-b")
    return rig
