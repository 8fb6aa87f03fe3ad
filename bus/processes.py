"""The processes of one machine: started, watched, restarted with back-off, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import structlog

from bus.server import EmbeddedServer, die_with_parent
from schemas.errors import SetupError

log = structlog.get_logger()

WATCH_EVERY_S = 0.05
READY_TIMEOUT_S = 30.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 10.0
STEADY_AFTER_S = 2.0  # a process that served this long begins again with the shortest back-off
KILL_GRACE_S = 10.0
STOP_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a role runs: ``penstock ARGUMENTS``. *ready_file* appears when it serves."""

    role: str
    arguments: tuple[str, ...]
    ready_file: Path
    environ: Mapping[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()
    stop_wait_s: float = STOP_WAIT_S


class Child:
    """One role's process, present or to be restarted."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self._backoff_s = BACKOFF_MIN_S
        self._serves_since: float | None = None
        self._retry_at: float | None = None

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    def start(self) -> None:
        self.command.ready_file.unlink(missing_ok=True)
        self._serves_since = None
        self._retry_at = None
        # -P: a folder called workers or schemas where the user stands must not be taken for ours.
        self.process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", "-m", "penstock", *self.command.arguments],
            env={**os.environ, **self.command.environ},
            stdin=subprocess.DEVNULL,
            pass_fds=self.command.pass_fds,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, nothing that could deadlock
            start_new_session=True,  # a Ctrl-C is for the parent, which then stops its children in order
        )

    def ready(self) -> dict[str, Any] | None:
        """What the process wrote when it was ready; None before."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            told: dict[str, Any] = msgspec.json.decode(self.command.ready_file.read_bytes())
            return told
        return None

    def revive(self) -> bool:
        """Restarts the process if it has died, after its back-off. True if a new one was started."""
        now = time.monotonic()
        if self.process is None or self.process.poll() is None:
            if self._serves_since is None and self.command.ready_file.exists():
                self._serves_since = now
            return False
        if self._retry_at is None:
            if self._serves_since is not None and now - self._serves_since > STEADY_AFTER_S:
                self._backoff_s = BACKOFF_MIN_S
            log.warning(
                "process_died",
                process=self.command.role,
                exit_code=self.process.returncode,
                restart_in_s=self._backoff_s,
            )
            self._retry_at = now + self._backoff_s
            self._backoff_s = min(BACKOFF_MAX_S, self._backoff_s * 2)
        if now < self._retry_at:
            return False
        self.start()
        return True

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()


def end_after(stop_wait_s: float) -> None:
    """Ends this process if it hasn't stopped after *stop_wait_s* and some grace: who would kill it may be gone, as a killed `up`."""
    timer = threading.Timer(stop_wait_s + KILL_GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


class Supervisor:
    """The NATS server, if it is ours, and the children; stopped in the order of *children*, NATS last."""

    def __init__(self, children: list[Child], server: EmbeddedServer | None, *, on_change: Callable[[], None]) -> None:
        self._children = children
        self._server = server
        self._on_change = on_change

    async def wait_ready(self) -> None:
        """Raises: SetupError if a process ends, or isn't ready in time."""
        until = time.monotonic() + READY_TIMEOUT_S
        waiting = list(self._children)
        while waiting:
            for child in waiting:
                if child.process is not None and child.process.poll() is not None:
                    raise SetupError(f"the {child.command.role} process ended while starting; its reason is above")
            waiting = [child for child in waiting if child.ready() is None]
            if time.monotonic() > until:
                late = ", ".join(child.command.role for child in waiting)
                raise SetupError(f"not ready within {READY_TIMEOUT_S:.0f} s: {late}")
            await asyncio.sleep(0.005)

    async def watch(self) -> None:
        """Restarts what dies, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            changed = [child.revive() for child in self._children]
            if self._server is not None and self._server.exit_code() is not None:
                changed.append(await self._restart_server(self._server))
            if any(changed):
                self._on_change()

    async def stop(self) -> None:
        """Each process in turn: asked, waited for, and killed if it doesn't go."""
        for child in self._children:
            child.ask_to_stop()
            await _gone(child, child.command.stop_wait_s)
            child.kill()
            await _gone(child, KILL_GRACE_S)
        if self._server is not None:
            await self._server.stop()

    def kill(self) -> None:
        for child in self._children:
            child.kill()

    async def _restart_server(self, server: EmbeddedServer) -> bool:
        log.warning("process_died", process="nats", exit_code=server.exit_code(), restart_in_s=BACKOFF_MIN_S)
        await asyncio.sleep(BACKOFF_MIN_S)
        try:
            await server.start()
        except SetupError as error:
            log.error("nats_not_restarted", error=error.message)
            await asyncio.sleep(BACKOFF_MAX_S / 10)
            return False
        return True


async def _gone(child: Child, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while child.process is not None and child.process.poll() is None and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
