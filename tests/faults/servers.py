"""One NATS server, or three in a cluster: started, killed and started again on the same ports, and asked what they hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from bus.server import die_with_parent, find_binary, server_config
from schemas.settings import NatsSettings
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
PASSWORD, CLUSTER_PASSWORD = "12345", "0e1"
CLUSTER_SIZE = 3
HEALTHY_WAIT_S = 60.0  # a new cluster elects a leader for itself and for each stream
ASK_TIMEOUT_S = 2.0
HEALTH_PATH = "/healthz"
PORT_MIN, PORT_MAX = 10_000, 32_000
PORTS_TRIED_MAX = 200
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NatsServer:
    """A nats-server as a process. Its store outlives it; what it holds in memory doesn't."""

    def __init__(
        self, name: str, folder: Path, config: Path, environ: dict[str, str], *, port: int, monitor: int
    ) -> None:
        self.name = name
        self.port = port
        self._folder = folder
        self._config = config
        self._environ = environ
        self._monitor = monitor
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def url(self, port: int) -> str:
        """Its address behind a proxy at *port*."""
        return f"nats://penstock:{PASSWORD}@127.0.0.1:{port}"

    def launch(self) -> None:
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_binary(), "-c", str(self._config)],
                env={**os.environ, **self._environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call
                start_new_session=True,
            )

    async def healthy(self) -> None:
        await eventually(self._is_healthy, timeout_s=HEALTHY_WAIT_S, what=f"{self.name}'s health", every_s=0.02)

    async def kill(self) -> None:
        """kill -9; returns when it is dead."""
        assert self._process is not None
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def asked(self, path: str) -> dict[str, Any]:
        """What the monitoring port answers on *path*. Raises: OSError, ValueError."""
        return await asyncio.to_thread(self._ask, path)

    async def _is_healthy(self) -> bool:
        return bool((await self.asked(HEALTH_PATH))["status"] == "ok")

    def _ask(self, path: str) -> dict[str, Any]:
        with _opener.open(f"http://127.0.0.1:{self._monitor}{path}", timeout=ASK_TIMEOUT_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def one_server(folder: Path) -> list[NatsServer]:
    """A server configured as the embedded one is."""
    port, monitor = free_ports(2)
    config = folder / "nats.conf"
    store = folder / "nats"
    store.mkdir()
    text = server_config(NatsSettings(), store, port=port, password=PASSWORD)
    config.write_text(f'http: "127.0.0.1:{monitor}"\n{text}', encoding="utf-8")
    return [NatsServer("nats-1", folder, config, {}, port=port, monitor=monitor)]


def three_servers(folder: Path) -> list[NatsServer]:
    """The cluster of deploy/nats.conf, on loopback."""
    ports = free_ports(3 * CLUSTER_SIZE)
    clients, monitors, between = (ports[at::CLUSTER_SIZE] for at in range(3))
    routes = ", ".join(f'"nats://cluster:{CLUSTER_PASSWORD}@127.0.0.1:{port}"' for port in between)
    made = []
    for number in range(CLUSTER_SIZE):
        name = f"nats-{number + 1}"
        (folder / name).mkdir()
        environ = {
            "NATS_NAME": f'"{name}"',
            "NATS_LISTEN": f'"127.0.0.1:{clients[number]}"',
            "NATS_MONITOR": f'"127.0.0.1:{monitors[number]}"',
            "NATS_CLUSTER_LISTEN": f'"127.0.0.1:{between[number]}"',
            "NATS_STORE": f'"{folder / name}"',
            "NATS_PASSWORD": f'"{PASSWORD}"',
            "NATS_CLUSTER_PASSWORD": f'"{CLUSTER_PASSWORD}"',
            "NATS_ROUTES": f"[{routes}]",
        }
        config = ROOT / "deploy" / "nats.conf"
        made.append(NatsServer(name, folder, config, environ, port=clients[number], monitor=monitors[number]))
    return made


async def leader_of(servers: list[NatsServer], stream: str) -> NatsServer | None:
    """The server that leads *stream*; None while nobody does."""
    for server in servers:
        try:
            told = await server.asked("/jsz?streams=1")
        except (OSError, ValueError):
            continue
        for account in told.get("account_details", []):
            for each in account.get("stream_detail", []):
                leader = each.get("cluster", {}).get("leader")
                if each["name"] == stream and leader:
                    return next(found for found in servers if found.name == leader)
    return None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, below those that the system gives to whoever dials.

    One of those could be taken while its server is down; by a connection to itself, even.
    """
    found: list[int] = []
    for port in random.sample(range(PORT_MIN, PORT_MAX), PORTS_TRIED_MAX):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")
