"""A model server as a child of the worker: started, watched until it is ready, restarted with back-off, never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from workers.engine.phases import Phase, phase_after

log = structlog.get_logger()

GUARD = Path(__file__).with_name("guard.py")
HEALTH_EVERY_S = 0.1
BACKOFF_MIN_S = 1.0
BACKOFF_MAX_S = 60.0
STEADY_AFTER_S = 120.0  # an engine that ran this long begins again with the shortest back-off
STOP_WAIT_S = 15.0
LOG_MAX_BYTES = 8 * 1024 * 1024
LOG_LINE_MAX_BYTES = 16 * 1024
TAIL_LINES = 20

Healthy = Callable[[], Awaitable[bool]]
Tell = Callable[[str | None], None]


@dataclass(frozen=True, kw_only=True)
class EngineCommand:
    """What is run, and where its log goes (bounded: one old file is kept)."""

    name: str
    argv: tuple[str, ...]
    socket: Path
    log_file: Path
    environ: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """One engine process under the guard. `need` is how a job says that it wants it up."""

    def __init__(self, command: EngineCommand, *, healthy: Healthy, start_timeout_s: float) -> None:
        self.phase = Phase.STOPPED
        self._command = command
        self._healthy = healthy
        self._start_timeout_s = start_timeout_s
        self._tell: Tell = _nobody
        self._process: asyncio.subprocess.Process | None = None
        self._runner: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._wanted = asyncio.Event()
        self._log = _BoundedLog(command.log_file)

    @property
    def pid(self) -> int | None:
        """The guard's; it leads the engine's process group."""
        return None if self._process is None else self._process.pid

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    def attach(self, tell: Tell) -> None:
        """Starts the engine, and keeps it up from here on. *tell* hears why it can't serve, and None when it can."""
        self._tell = tell
        self._wanted.set()
        self._tell(_reason(Phase.STARTING))
        self._runner = asyncio.create_task(self._keep_up(), name=f"engine-{self._command.name}")

    async def need(self) -> None:
        """Returns when the engine is ready. One that was unloaded is loaded again."""
        if not self._ready.is_set():
            self._wanted.set()
            await self._ready.wait()

    async def unload(self) -> None:
        """Stops the engine until somebody needs it. It still counts as able to serve: the first job loads it."""
        self._wanted.clear()
        self._ready.clear()
        await self._stop_process()

    async def aclose(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        await self._stop_process()

    async def _keep_up(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while True:
            await self._wanted.wait()
            began = time.monotonic()
            await self._run_once()
            if not self._wanted.is_set():  # unloaded on purpose
                self._enter(Phase.STOPPED)
                continue
            self._enter(Phase.FAILED)
            self._tell(f"the engine stopped; it is started again in {backoff_s:g} s")
            if time.monotonic() - began > STEADY_AFTER_S:
                backoff_s = BACKOFF_MIN_S
            log.warning("engine_stopped", engine=self._command.name, restart_in_s=backoff_s, tail=self._log.tail())
            await asyncio.sleep(backoff_s)
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)

    async def _run_once(self) -> None:
        """One life of the engine, from its start to its end."""
        self._enter(Phase.STARTING)
        process = self._process = await self._spawn()
        reading = asyncio.create_task(self._read_log(process))
        starting = asyncio.create_task(self._until_healthy())
        try:
            await asyncio.wait([starting, reading], return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and starting.result():
                self._enter(Phase.READY)
                self._ready.set()
                self._tell(None)
            elif starting.done():
                log.warning("engine_start_too_slow", engine=self._command.name, limit_s=self._start_timeout_s)
                await self._stop_process()
            # The log ends when the last process of the engine has; that is also how a crash shows, at once.
            await reading
            await process.wait()
        finally:
            self._ready.clear()
            starting.cancel()
            reading.cancel()
            await asyncio.gather(starting, reading, return_exceptions=True)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._command.socket.unlink(missing_ok=True)  # a stale one can't be bound
        return await asyncio.create_subprocess_exec(
            sys.executable,
            str(GUARD),
            *self._command.argv,
            env={**os.environ, **self._command.environ},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=LOG_LINE_MAX_BYTES,
        )

    async def _until_healthy(self) -> bool:
        until = time.monotonic() + self._start_timeout_s
        while time.monotonic() < until:
            if await self._healthy():
                return True
            await asyncio.sleep(HEALTH_EVERY_S)
        return False

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        while data := await process.stdout.read(LOG_LINE_MAX_BYTES):
            self._log.write(data)
            if self.phase not in (Phase.READY, Phase.STOPPED, Phase.FAILED):
                for line in data.decode(errors="replace").splitlines():
                    self._enter(phase_after(line, self.phase))

    async def _stop_process(self) -> None:
        """SIGTERM first; what doesn't go in time is killed with its whole group."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_WAIT_S):
                await process.wait()
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            log.info("engine_phase", engine=self._command.name, phase=phase.value)
            if phase not in (Phase.READY, Phase.STOPPED, Phase.FAILED):
                self._tell(_reason(phase))


class _BoundedLog:
    """The engine's output in a file of at most `LOG_MAX_BYTES`; the one before is kept as ``….old``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = 0
        self._last = b""

    def write(self, data: bytes) -> None:
        if self._size + len(data) > LOG_MAX_BYTES:
            self._path.replace(self._path.with_suffix(".old"))
            self._size = 0
        with self._path.open("ab") as file:
            self._size = file.tell() + len(data)
            file.write(data)
        self._last = (self._last + data)[-LOG_LINE_MAX_BYTES:]

    def tail(self) -> list[str]:
        return self._last.decode(errors="replace").splitlines()[-TAIL_LINES:]


def socket_path(name: str) -> Path:
    """A short path for a Unix socket (they may have 107 bytes), in a folder that is ours alone."""
    return Path(tempfile.mkdtemp(prefix="penstock-")) / f"{name[:20]}.sock"


def _reason(phase: Phase) -> str:
    return f"the engine is {phase.value}"


def _nobody(_: str | None) -> None:
    """Before `attach`."""
