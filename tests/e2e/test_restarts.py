"""Every process is stopped in peace and started again under load, one after the other: no client notices, and no token is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.asking import Heard, ask, read
from tests.e2e.deployment import Deployment, Provider, penstock_up
from tests.measured import measured
from tests.waiting import eventually

CLIENTS = 10
WORDS = 12
PACE_S = 0.03  # an answer takes long enough for all clients to have one under way at every restart
BETWEEN_S = 0.7
ROLES = ("ingress", "worker", "ledger", "ingress-2", "worker-2", "ingress", "worker", "ledger")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def pairs(provider: Provider, tmp_path: Path) -> Iterator[Deployment]:
    """Two ingresses behind one port, two workers."""
    settings = {"PENSTOCK_UP_INGRESSES": "2", "PENSTOCK_UP_WORKERS": "2"}
    with penstock_up(tmp_path, provider, settings=settings) as running:
        assert {"ingress", "ingress-2", "worker", "worker-2"} <= set(running.ready()["pids"])
        yield running
    assert running.process.returncode == 0
    assert running.complaints() == []


class Load:
    """Clients that keep their connections and never ask a second time."""

    def __init__(self, up: Deployment) -> None:
        self.heard: list[Heard] = []
        self.broken: list[str] = []
        self._up = up
        self._over = asyncio.Event()
        self._clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]

    async def end(self) -> None:
        self._over.set()
        await asyncio.gather(*self._clients)

    async def _client(self, number: int) -> None:
        async with self._up.sdk() as client:
            count = 0
            while not self._over.is_set():
                count += 1
                try:
                    self.heard.append(await (read if (number + count) % 2 else ask)(client, f"{number} {count}"))
                except openai.APIError as error:
                    self.broken.append(f"{type(error).__name__}: {error} ({error.__cause__!r})")


async def test_no_client_notices_and_the_books_agree(pairs: Deployment, provider: Provider) -> None:
    pairs.expected |= {"process_died"}
    provider.script(tokens=WORDS, pace_s=PACE_S)
    load = Load(pairs)
    await eventually(lambda: len(load.heard) > 2 * CLIENTS, timeout_s=20, what="the load")
    for role in ROLES:
        pid = pairs.pid(role)
        os.kill(pid, signal.SIGTERM)
        await eventually(lambda role=role, pid=pid: _serving(pairs, role) != pid, timeout_s=40, what=f"another {role}")
        await asyncio.sleep(BETWEEN_S)
    await load.end()
    measured("requests_over_restarts", len(load.heard))
    assert load.broken == []
    assert [each for each in load.heard if each.code is not None] == []
    whole = " ".join(f"w{number}" for number in range(WORDS))
    assert {(each.text, each.tokens) for each in load.heard} == {(whole, WORDS)}
    ids = {each.request_id for each in load.heard}
    assert len(ids) == len(load.heard)

    def in_the_books() -> list[dict[str, object]]:
        rows = pairs.sql("SELECT * FROM requests")
        return rows if {row["request_id"] for row in rows if row["status"] == "completed"} == ids else []

    rows = await eventually(in_the_books, timeout_s=20, every_s=0.2, what="all requests in the ledger")
    assert len(rows) == len(ids)
    assert {row["completion_tokens"] for row in rows} == {WORDS}


def _serving(up: Deployment, role: str) -> int:
    """The pid of the role's process, which says that it serves. Raises: OSError, AssertionError before it does."""
    told = json.loads((up.home / "run" / f"{role}.json").read_bytes())
    assert told["pid"] == up.pid(role)
    return int(told["pid"])
