"""The supervisor: what dies comes back, as often as it takes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from bus.connection import connect
from bus.processes import Child, Command, Supervisor
from bus.server import EmbeddedServer
from schemas.errors import SetupError
from tests.restarts import is_gone
from tests.waiting import eventually


async def test_a_server_that_can_not_be_restarted_is_tried_again(
    nats_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ntest "$1" = --version && echo "nats-server: v2.15.1"\necho x >> ' + f"{tmp_path}/tries\n"
    )
    broken.chmod(0o755)
    changes: list[int] = []
    async with _watching(Supervisor([], nats_server, on_change=lambda: changes.append(nats_server.pid))):
        monkeypatch.setenv("NATS_SERVER", str(broken))
        os.kill(nats_server.pid, signal.SIGKILL)
        await eventually(lambda: len((tmp_path / "tries").read_text()) >= 4, what="a try that failed")
        monkeypatch.delenv("NATS_SERVER")
        await eventually(lambda: changes, what="the restart")
    assert nats_server.exit_code() is None
    await (await connect(nats_server.url, name="test")).close()


async def test_a_process_that_dies_is_started_again_and_the_change_is_told(
    nats_server: EmbeddedServer, tmp_path: Path
) -> None:
    child = _worker(nats_server, tmp_path)
    changes: list[int | None] = []
    supervisor = Supervisor([child], None, on_change=lambda: changes.append(child.pid))
    child.start()
    await supervisor.wait_ready()
    first = child.pid
    assert first is not None
    async with _watching(supervisor):
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: changes)
        assert changes == [child.pid]
        assert child.pid != first
        await supervisor.wait_ready()
    await supervisor.stop()
    assert child.process is not None
    assert child.process.returncode == 0


async def test_what_has_served_comes_back_at_once_and_what_dies_while_starting_ever_later(
    nats_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bus.processes.STEADY_AFTER_S", 0.2)
    child = _worker(nats_server, tmp_path)
    changes: list[int | None] = []
    supervisor = Supervisor([child], None, on_change=lambda: changes.append(child.pid))
    child.start()
    with capture_logs() as told:
        async with _watching(supervisor):
            for deaths, serves in enumerate((True, False, False, True), start=1):
                if serves:
                    await eventually(lambda: child.ready() is not None, timeout_s=20.0)
                    await asyncio.sleep(0.5)
                child.kill()
                await eventually(lambda so_far=deaths: len(changes) == so_far)
    await supervisor.stop()
    assert [line["restart_in_s"] for line in told if line["event"] == "process_died"] == [0.1, 0.2, 0.4, 0.1]


async def test_a_process_that_ends_while_starting_is_a_clear_error(nats_server: EmbeddedServer, tmp_path: Path) -> None:
    child = Child(Command(role="worker", arguments=("worker", "--nonsense"), ready_file=tmp_path / "ready"))
    child.start()
    with pytest.raises(SetupError, match="the worker process ended while starting"):
        await Supervisor([child], None, on_change=lambda: None).wait_ready()


async def test_one_that_does_not_go_in_time_is_killed(nats_server: EmbeddedServer, tmp_path: Path) -> None:
    child = _worker(nats_server, tmp_path, stop_wait_s=0.2)
    supervisor = Supervisor([child], None, on_change=lambda: None)
    child.start()
    await supervisor.wait_ready()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    await supervisor.stop()
    assert is_gone(child.pid)


def _worker(server: EmbeddedServer, tmp_path: Path, *, stop_wait_s: float = 10.0) -> Child:
    ready_file = tmp_path / "ready"
    arguments = ("worker", "--route", "echo", "--ready-file", str(ready_file))
    return Child(
        Command(
            role="worker",
            arguments=arguments,
            ready_file=ready_file,
            environ={"PENSTOCK_NATS": server.url},
            stop_wait_s=stop_wait_s,
        )
    )


@asynccontextmanager
async def _watching(supervisor: Supervisor) -> AsyncIterator[None]:
    watching = asyncio.create_task(supervisor.watch())
    yield
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


def test_a_process_that_nobody_is_there_to_kill_ends_by_itself() -> None:
    """Whatever its event loop does, and though nobody waits for it."""
    script = (
        "import time; from bus import processes; processes.KILL_GRACE_S = 0.1; processes.end_after(0.1); time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 1
