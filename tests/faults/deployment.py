"""A whole Penstock of processes on this machine, with a proxy between any two that speak to each other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ledger.client import Ledger, ask, table_of
from tests.e2e.deployment import http
from tests.faults.clock import Clock
from tests.faults.processes import ROOT, Command, Member
from tests.faults.proxy import Link
from tests.faults.servers import NatsServer, free_ports, one_server, three_servers
from tests.faults.witness import Witness
from tests.waiting import eventually

WATCH_EVERY_S = 0.05
LISTEN_BACKLOG = 2048
SERVED_WAIT_S = 60.0
API_KEY, ADMIN_KEY = "sk-faults-client-0123456789", "sk-faults-admin-0123456789"
MODEL, ENGINE_MODEL = "rented", "owned"
INPUT_PICO, CACHED_PICO, OUTPUT_PICO = 150_000, 75_000, 600_000  # the prices below, in pico-dollars a token
CONFIG = """\
[nats]
replicas = {replicas}

[ingress]
drain_s = 20.0

[ingress.timeouts]
queue_s = 20.0
first_token_s = 15.0
idle_s = 15.0
total_s = 40.0

[worker]
drain_s = 20.0
connect_timeout_s = 3.0
first_byte_timeout_s = 15.0
idle_timeout_s = 15.0
discover = false

[ledger]
port = {ledger_port}
{ledger_more}

[[routes]]
id = "rented"
provider = "openai"
base_url = "http://127.0.0.1:{provider_port}/v1"
max_concurrency = {slots}

[[routes.models]]
name = "rented"
price = {{ input = 0.15, cached_input = 0.075, output = 0.60 }}
"""
LEDGER = """\
ingress_silence_s = 6.0
receipt_wait_s = 4.0
"""  # shorter than by default: an ingress that is stopped for long is taken for dead, and fenced off
ENGINE = """
[[routes]]
id = "owned"
provider = "vllm"
max_concurrency = {slots}

[routes.vllm]
command = ["{python}", "{program}"]
args = ["--witness", "{witness_port}"]

[[routes.models]]
name = "owned"
price = {{ input = 0.15, cached_input = 0.075, output = 0.60 }}
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large it is. *roots* are trees of other releases, by the member that runs them."""

    ingresses: int = 2
    workers: int = 2
    slots: int = 3  # of each route of each worker: fewer than there are clients, so that jobs wait
    servers: int = 1
    engines: bool = True
    roots: dict[str, Path] = field(default_factory=dict)


class Deployment:
    """*links* are named after who dials whom: `client>ingress-1`, `worker-2>nats-1`, `worker-1>provider`."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan = plan
        self.folder = folder
        self.witness = Witness()
        self.clock = Clock(folder / "clock")
        self.servers: list[NatsServer] = one_server(folder) if plan.servers == 1 else three_servers(folder)
        self.links: dict[str, Link] = {}
        self.members: dict[str, Member] = {}
        self.struck: set[str] = set()  # names of what a fault holds at the moment
        self._ports: dict[str, int] = {}
        self._sockets: list[socket.socket] = []

    async def start(self) -> None:
        await self.witness.start()
        for server in self.servers:
            server.launch()
        await asyncio.gather(*(server.healthy() for server in self.servers))
        for name in self._names():
            await self._add(name)
        for member in self.members.values():
            member.start()
        await asyncio.gather(*(member.ready() for member in self.members.values()))
        await self.serving()

    async def stop(self) -> None:
        for link in self.links.values():
            link.heal()
        for role in ("ingress", "worker", "ledger"):
            await asyncio.gather(*(member.terminate() for member in self.named(role)))
        for link in self.links.values():
            await link.stop()
        await asyncio.gather(*(server.kill() for server in self.servers))
        await self.witness.stop()
        for sock in self._sockets:
            sock.close()

    async def watch(self) -> None:
        """Starts again what dies by itself, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            for member in self.members.values():
                member.revive()

    def named(self, role: str) -> list[Member]:
        return [member for member in self.members.values() if member.role == role]

    def base_urls(self) -> list[str]:
        """Where clients find the API: one address for each ingress, each behind its proxy."""
        return [f"http://127.0.0.1:{self.links[f'client>{each.name}'].port}/v1" for each in self.named("ingress")]

    def direct_url(self, ingress: Member) -> str:
        """The ingress's own address, with no proxy between."""
        return f"http://127.0.0.1:{self._ports[ingress.name]}"

    def engines(self) -> list[psutil.Process]:
        """The engines of the workers that run now, without their guards."""
        found = []
        for worker in self.named("worker"):
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(worker.pid).children(recursive=True)
                found += [
                    each for each in children if "--uds" in each.cmdline() and "guard.py" not in str(each.cmdline())
                ]
        return found

    async def sql(self, statement: str, *params: Any) -> list[dict[str, Any]]:
        """What POST /v1/sql answers. Raises: SetupError if there is no answer."""
        (ledger,) = self.named("ledger")
        there = Ledger((ledger.told() or {}).get("url", "http://127.0.0.1:1"), ADMIN_KEY)
        table = table_of(await asyncio.to_thread(ask, there, statement, params=params))
        assert not table.truncated, "more rows than the ledger gives at once"
        return [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]

    async def serving(self, *workers: Member) -> None:
        """Returns when every ingress offers all that *workers* serve; without them, all that every worker serves."""
        routes = {MODEL, *([ENGINE_MODEL] if self.plan.engines else [])}

        async def offered() -> bool:
            names = [(each.told() or {}).get("worker") for each in workers or self.named("worker")]
            wanted = {(name, route) for name in names for route in routes}
            answers = [await self.admin(ingress, "/admin/v1/routes") for ingress in self.named("ingress")]
            serving = [
                {(row["worker"], row["route"]) for row in answer["data"] if row["state"] == "serving"}
                for answer in answers
            ]
            return all(wanted <= each for each in serving)

        await eventually(offered, timeout_s=SERVED_WAIT_S, every_s=0.05, what="the routes")  # type: ignore[arg-type]

    async def admin(self, ingress: Member, path: str) -> dict[str, Any]:
        """What *ingress* answers to GET *path*. Raises: OSError, ValueError."""
        return await asyncio.to_thread(http, self.direct_url(ingress) + path, key=ADMIN_KEY)  # type: ignore[no-any-return]

    def _names(self) -> list[str]:
        counted = [("ingress", self.plan.ingresses), ("worker", self.plan.workers), ("ledger", 1)]
        return [f"{role}-{number + 1}" for role, count in counted for number in range(count)]

    async def _add(self, name: str) -> None:
        role = name.partition("-")[0]
        urls = []
        for server in self.servers:
            link = await self._link(f"{name}>{server.name}", server.port)
            urls.append(server.url(link.port))
        provider = await self._link(f"{name}>provider", self.witness.port) if role == "worker" else None
        self._ports[name] = free_ports(1)[0]
        config = self.folder / f"{name}.toml"
        config.write_text(self._config(name, 1 if provider is None else provider.port), encoding="utf-8")
        arguments = [role, "--nats", ",".join(urls), "--config", str(config)]
        fds: tuple[int, ...] = ()
        if role == "ingress":
            fds = (await self._listening(name),)
            arguments += ["--fd", str(fds[0])]
        elif role == "ledger":
            arguments += ["--home", str(self.folder / "home")]
        environ = {"PENSTOCK_API_KEY": API_KEY, "PENSTOCK_ADMIN_KEY": ADMIN_KEY} if role == "ingress" else {}
        environ |= self.clock.environ(name)
        root = self.plan.roots.get(name, ROOT)
        self.members[name] = Member(
            Command(name=name, arguments=tuple(arguments), folder=self.folder, environ=environ, root=root, pass_fds=fds)
        )

    async def _listening(self, name: str) -> int:
        """The ingress's socket, which outlives it, as that of `penstock up` does: while it is away, clients wait."""
        sock = socket.create_server(("127.0.0.1", self._ports[name]), backlog=LISTEN_BACKLOG)
        self._sockets.append(sock)
        await self._link(f"client>{name}", self._ports[name])
        return sock.fileno()

    async def _link(self, name: str, target: int) -> Link:
        self.links[name] = link = Link(name, target)
        await link.start()
        return link

    def _config(self, name: str, provider_port: int) -> str:
        program = ROOT / "tests" / "faults" / "engine.py"
        text = CONFIG.format(
            replicas=1 if self.plan.servers == 1 else 3,
            ledger_port=self._ports[name],
            ledger_more=LEDGER if name.startswith("ledger") else "",
            provider_port=provider_port,
            slots=self.plan.slots,
        )
        if self.plan.engines:
            text += ENGINE.format(
                slots=self.plan.slots, python=sys.executable, program=program, witness_port=self.witness.port
            )
        return text


@contextlib.asynccontextmanager
async def deployed(folder: Path, plan: Plan) -> AsyncIterator[Deployment]:
    """One that serves, and is looked after. What was started ends with the block, whatever becomes of that."""
    made = Deployment(folder, plan)
    watching = asyncio.create_task(made.watch(), name="watch")
    try:
        await made.start()
        yield made
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await made.stop()
