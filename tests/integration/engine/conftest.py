"""An engine that is a fake behind the real guard; when a test ends, no process of it may be left."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import eventually
from workers.engine.engine import Engine, EngineCommand
from workers.providers.vllm import _Health

FAKE = Path(__file__).parents[2] / "fake_engine.py"


@dataclass
class Rig:
    engine: Engine
    command: EngineCommand
    told: list[str | None] = field(default_factory=list)

    def start(self) -> None:
        self.engine.attach(self.told.append)

    async def started(self) -> None:
        self.start()
        await self.ready()

    async def ready(self) -> None:
        await eventually(lambda: self.engine.is_ready, timeout_s=10, what="the engine is ready")

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.command.socket)


def processes_of(socket: Path) -> list[psutil.Process]:
    """The guard, the engine, and the engine's child, wherever they are: a fake's are told by its socket."""
    found = [p for p in psutil.process_iter() if str(socket) in " ".join(_words(p))]
    return list({q.pid: q for p in found for q in [p, *_children(p)]}.values())


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


Make = Callable[..., Rig]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Rig] = []

    def make_rig(*flags: str, **changes: Any) -> Rig:
        socket = tmp_path / "e.sock"
        command = EngineCommand(
            name="fake",
            argv=(sys.executable, str(FAKE), "serve", "m", "--uds", str(socket), *flags),
            socket=socket,
            log_file=tmp_path / "e.log",
        )
        wanted = {"healthy": _Health(socket), "start_timeout_s": 10.0, "backoff_min_s": 0.05, **changes}
        made.append(Rig(Engine(command, **wanted), command))
        return made[-1]

    yield make_rig
    for rig in made:
        await rig.engine.aclose()
        assert rig.processes() == []
        assert not rig.command.socket.exists()
