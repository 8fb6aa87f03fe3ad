"""The three servers of compose.yaml, really started from deploy/nats.conf on loopback, and what happens when one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from bus.connection import BusUnavailable, Connection, connect
from bus.log import EventLog
from bus.publisher import Publisher
from bus.reader import OrderedReader
from bus.server import die_with_parent, find_binary
from bus.streams import ensure_streams
from schemas import subjects
from schemas.errors import LogUnavailable
from schemas.events import RequestRejected
from schemas.ids import EventId, IngressId, RequestId, new_id
from schemas.settings import NatsSettings, load
from schemas.upcasters import read_event
from tests.ports import free_port
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
SERVERS = ["nats-1", "nats-2", "nats-3"]
PASSWORD, CLUSTER_PASSWORD = "12345", "0e1"
ELECTION_MAX_S = 30.0  # NATS waits 4 to 9 s for a leader before it elects another, and a vote may be split
STARTS_MAX = 3


class PortTaken(Exception):
    """A server ended at once."""


@dataclass
class Server:
    name: str
    process: subprocess.Popen[bytes]
    ports: dict[str, list[str]]

    @property
    def url(self) -> str:
        return self.ports["nats"][0].replace("nats://", f"nats://penstock:{PASSWORD}@")

    def asked(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.ports["monitoring"][0] + path, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        servers = await _cluster(stack, tmp_path)
        health = _health_path()
        for server in servers:
            await eventually(lambda s=server: s.asked(health)["status"] == "ok", timeout_s=ELECTION_MAX_S, every_s=0.05)
        yield servers


async def test_events_outlive_the_server_that_leads_them(cluster: list[Server]) -> None:
    """A process whose server dies finds another one. Its log waits for the election, then goes on, and stores nothing twice."""
    settings = load(None, _variables("ingress-1")).nats
    url = ",".join(server.url for server in cluster)
    connections = [await connect(url, name=f"test-{number}") for number in range(3)]
    # All roles do this at once.
    await asyncio.gather(*(_once_elected(partial(ensure_streams, one, settings)) for one in connections))
    publisher = Publisher(connections[0])
    await publisher.start()
    log = EventLog(connections[0], publisher, producer="test", fence=subjects.fence(IngressId("test")))
    reader = OrderedReader(connections[1], stream=subjects.EVENTS)
    await _once_elected(reader.start)
    await log.append(_event("before"))
    await _assert_replicated(connections[0], settings)
    _assert_configured(cluster[0], settings)

    leader = (await connections[0].api(f"STREAM.INFO.{subjects.EVENTS}"))["cluster"]["leader"]
    killed = next(server for server in cluster if server.name == leader)
    killed.process.kill()
    killed.process.wait()
    async with asyncio.timeout(ELECTION_MAX_S):
        await log.append(_event("after"))

    assert await _codes(reader, 2) == ["before", "after"]
    fresh = OrderedReader(connections[2], stream=subjects.EVENTS)
    await _once_elected(fresh.start)
    assert await _codes(fresh, 2) == ["before", "after"]
    assert await fresh.pending() == 0
    await _assert_fenced(
        log, EventLog(connections[0], publisher, producer="other", fence="events.fence.other"), publisher
    )
    for closing in (reader, fresh):
        await closing.close()
    await publisher.stop()
    for connection in connections:
        await connection.close()


async def _assert_fenced(log: EventLog, other: EventLog, publisher: Publisher) -> None:
    """The stream's leader checks the condition before it proposes a page; several on their way don't hinder one another."""
    await asyncio.gather(*(each.append(_event("between")) for _ in range(20) for each in (log, other)))
    await publisher.publish(subjects.fence(IngressId("test")), b"", timeout_s=5.0)
    with pytest.raises(LogUnavailable):
        await log.append(_event("never"))
    await other.append(_event("elsewhere"))


async def _once_elected(work: Callable[[], Awaitable[None]]) -> None:
    """NATS gives no answer while it elects a leader: a process ends then, and is started again."""
    async with asyncio.timeout(ELECTION_MAX_S):
        while True:
            try:
                return await work()
            except BusUnavailable:
                await asyncio.sleep(0.05)


async def _codes(reader: OrderedReader, count: int) -> list[str]:
    """The codes of the first *count* events."""
    codes: list[str] = []
    async with asyncio.timeout(ELECTION_MAX_S):
        while len(codes) < count:
            for message in await reader.batch(max_messages=count, wait_s=1.0):
                events = [read_event(line) for line in message.data.split(b"\n")]
                codes += [event.code for event in events if isinstance(event, RequestRejected)]
    return codes


async def _assert_replicated(connection: Connection, settings: NatsSettings) -> None:
    assert settings.replicas == len(SERVERS)
    for stream in (subjects.JOBS, subjects.EVENTS, subjects.CONTROL):
        told = await connection.api(f"STREAM.INFO.{stream}")
        assert told["config"]["num_replicas"] == settings.replicas
        assert sorted([told["cluster"]["leader"], *(peer["name"] for peer in told["cluster"]["replicas"])]) == SERVERS


def _assert_configured(server: Server, settings: NatsSettings) -> None:
    """The server understood the file as it was meant."""
    told = server.asked("/varz")
    assert told["max_payload"] == settings.max_payload_bytes
    jetstream = told["jetstream"]["config"]
    assert jetstream["sync_always"] is True
    assert (jetstream["max_memory"], jetstream["max_storage"]) == (
        settings.max_memory_store_bytes,
        settings.max_file_store_bytes,
    )


def _event(code: str) -> RequestRejected:
    return RequestRejected(
        id=EventId(new_id()),
        ts_ns=time.time_ns(),
        org=None,
        request_id=RequestId(new_id()),
        producer="test",
        code=code,
        http_status=400,
    )


async def _cluster(stack: contextlib.ExitStack, folder: Path) -> list[Server]:
    """Three servers. Routes need ports that are known before; if somebody takes one meanwhile, once more with others."""
    for attempt in range(STARTS_MAX):
        ports = [free_port() for _ in SERVERS]
        servers = [
            stack.enter_context(_server(name, folder / str(attempt), port, ports))
            for name, port in zip(SERVERS, ports, strict=True)
        ]
        with contextlib.suppress(PortTaken):
            for server, started in servers:
                server.ports = await eventually(lambda s=server, p=started: _told_ports(s, p), timeout_s=10.0)
            return [server for server, _ in servers]
    raise AssertionError("no three free ports")


@contextlib.contextmanager
def _server(name: str, folder: Path, port: int, ports: list[int]) -> Iterator[tuple[Server, Path]]:
    own = folder / name
    (own / "ports").mkdir(parents=True)
    routes = ", ".join(f'"nats://cluster:{CLUSTER_PASSWORD}@127.0.0.1:{other}"' for other in ports)
    environ = _variables(name) | {
        "NATS_LISTEN": '"127.0.0.1:-1"',
        "NATS_MONITOR": '"127.0.0.1:-1"',
        "NATS_CLUSTER_LISTEN": f'"127.0.0.1:{port}"',
        "NATS_STORE": f'"{own}"',
        "NATS_ROUTES": f"[{routes}]",
    }
    with (own / "log").open("wb") as log:
        process = subprocess.Popen(
            [find_binary(), "-c", str(ROOT / "deploy" / "nats.conf"), "--ports_file_dir", str(own / "ports")],
            env={**os.environ, **environ},
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call
        )
    try:
        yield Server(name, process, {}), own / "ports" / f"nats-server_{process.pid}.ports"
    finally:
        process.kill()
        process.wait()


def _told_ports(server: Server, file: Path) -> dict[str, list[str]]:
    """Raises: OSError or ValueError while the file is not there yet."""
    if server.process.poll() is not None:
        raise PortTaken(server.name)
    told: dict[str, list[str]] = json.loads(file.read_bytes())
    return told


def _compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return found


def _variables(service: str) -> dict[str, str]:
    """The variables of *service* in compose.yaml, with the passwords of this test."""
    passwords = {"NATS_PASSWORD": PASSWORD, "NATS_CLUSTER_PASSWORD": CLUSTER_PASSWORD}
    given = _compose()["services"][service]["environment"]
    return {k: re.sub(r"\$\{(\w+)[^}]*\}", lambda m: passwords[m[1]], v) for k, v in given.items()}


def _health_path() -> str:
    """What the health check of compose.yaml asks for."""
    url: str = _compose()["services"]["nats-1"]["healthcheck"]["test"][-1]
    return "/" + url.split("/", 3)[3]
