"""The processes of Penstock under test: each is started, told apart from its successors, and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bus.server import die_with_parent
from tests.faults.clock import SKEWED
from tests.faults.unrecorded import killed_line
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
READY_WAIT_S = 60.0
STOP_WAIT_S = 40.0
RESTART_WAIT_S = 0.1  # of one that died by itself, the first time
RESTART_WAIT_MAX_S = 2.0
STEADY_AFTER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a member runs: ``penstock ARGUMENTS`` from the tree *root*."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    root: Path = ROOT
    pass_fds: tuple[int, ...] = ()

    @property
    def ready_file(self) -> Path:
        return self.folder / f"{self.name}.ready"

    @property
    def log_file(self) -> Path:
        return self.folder / f"{self.name}.log"


class Member:
    """One role's process. While it is *held* down, its death is meant and nobody starts it again."""

    def __init__(self, command: Command) -> None:
        self.name = command.name
        self.command = command
        self.starts = 0
        self.deaths: list[int] = []  # exit codes of those that ended by themselves
        self.held = False
        self._process: subprocess.Popen[bytes] | None = None
        self._began_s = 0.0
        self._wait_s = RESTART_WAIT_S
        self._retry_at_s: float | None = None

    @property
    def role(self) -> str:
        return self.name.partition("-")[0]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        command = self.command
        command.ready_file.unlink(missing_ok=True)
        self.starts += 1
        self.held = False
        self._began_s = time.monotonic()
        self._retry_at_s = None
        with command.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "penstock", *command.arguments, "--ready-file", str(command.ready_file)],
                cwd=command.folder,
                env=_environment() | {"PYTHONPATH": f"{SKEWED}{os.pathsep}{command.root}", **command.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=command.pass_fds,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call
                start_new_session=True,
            )

    def told(self) -> dict[str, Any] | None:
        """What the process wrote when it was ready; None before."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads(self.command.ready_file.read_bytes())
            return found
        return None

    async def ready(self) -> None:
        await eventually(
            lambda: self.runs and self.told(), timeout_s=READY_WAIT_S, every_s=0.02, what=f"{self.name} is ready"
        )

    async def kill(self) -> None:
        """kill -9, and nobody starts it again until `start`. Returns when it is dead."""
        self.held = True
        killed_s = time.monotonic()
        await self._end(signal.SIGKILL)
        with self.command.log_file.open("ab") as log:
            log.write(killed_line(killed_s))

    async def terminate(self) -> None:
        """SIGTERM, and nobody starts it again until `start`. Returns when it has gone."""
        self.held = True
        await self._end(signal.SIGTERM)

    def pause(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def revive(self) -> None:
        """Starts it again if it has died by itself, a little later each time that it does so at once."""
        if self._process is None or self.held or self.runs:
            return
        now = time.monotonic()
        if self._retry_at_s is None:
            self.deaths.append(self._process.returncode)
            steady = now - self._began_s > STEADY_AFTER_S
            self._wait_s = RESTART_WAIT_S if steady else min(RESTART_WAIT_MAX_S, 2 * self._wait_s)
            self._retry_at_s = now + self._wait_s
        if now >= self._retry_at_s:
            self.start()

    async def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            await asyncio.to_thread(process.wait, STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
            raise AssertionError(f"{self.name} did not end within {STOP_WAIT_S:g} s of {number.name}") from None


def _environment() -> dict[str, str]:
    """Without what the developer may have set for a Penstock, or keys of providers that would become routes."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_") and not k.endswith("_API_KEY")}
