"""A model server as a child of the worker: started, watched until it is ready, restarted with back-off, never left behind."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from schemas.errors import ProviderUnreachable, SetupError
from workers.engine.advice import advice, cause
from workers.engine.child import STOP_WAIT_S, Child
from workers.engine.log_file import LOG_MAX_BYTES, LogFile
from workers.engine.phases import Phase, phase_after

log = structlog.get_logger()

HEALTH_EVERY_S = 0.1
START_STOP_WAIT_S = 2.0  # one that isn't ready has nothing to finish, and hears no SIGTERM while it loads
BACKOFF_MIN_S = 1.0
BACKOFF_MAX_S = 60.0
STEADY_AFTER_S = 120.0  # an engine that ran this long begins again with the shortest back-off
NOT_UP = "The engine is not up."
NAME_MAX_CHARS = 60  # of an engine, in the names of its files
HASH_DIGITS = 16
SOCKET_PATH_MAX_BYTES = 103  # 107 on Linux, 103 on macOS
SETTLED = (Phase.READY, Phase.STOPPED, Phase.FAILED)

Healthy = Callable[[], Awaitable[bool]]
Tell = Callable[[str | None], None]


@dataclass(frozen=True, kw_only=True)
class EngineCommand:
    """What is run, and where its log goes (bounded: one old file is kept)."""

    name: str
    argv: tuple[str, ...]
    socket: Path
    log_file: Path
    scratch: Path | None = None  # a folder that is removed in the end
    environ: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """One engine process under the guard. `need` is how a job says that it wants it up."""

    def __init__(
        self,
        command: EngineCommand,
        *,
        healthy: Healthy,
        start_timeout_s: float,
        backoff_min_s: float = BACKOFF_MIN_S,
        log_max_bytes: int = LOG_MAX_BYTES,
    ) -> None:
        self.phase = Phase.STOPPED
        self._command = command
        self._healthy = healthy
        self._start_timeout_s = start_timeout_s
        self._backoff_min_s = backoff_min_s
        self._tell: Tell = _nobody
        self._child: Child | None = None
        self._runner: asyncio.Task[None] | None = None
        self._ready = False
        self._wanted = asyncio.Event()
        self._unloading = False
        self._on_demand = False  # it was unloaded before: it is loaded for a job that waits, and not down meanwhile
        self._waiting: set[asyncio.Future[None]] = set()  # one for each job that waits; the route's slots bound them
        self._log = LogFile(command.log_file, max_bytes=log_max_bytes)

    @property
    def pid(self) -> int | None:
        """The guard's; it leads the engine's process group."""
        return None if self._child is None else self._child.pid

    @property
    def is_ready(self) -> bool:
        return self._ready

    def attach(self, tell: Tell) -> None:
        """Starts the engine, and keeps it up from here on. *tell* hears why it can't serve, and None when it can."""
        self._tell = tell
        self._wanted.set()
        self._tell(_reason(Phase.STARTING))
        self._runner = asyncio.create_task(self._keep_up(), name=f"engine-{self._command.name}")

    async def need(self) -> None:
        """Returns when the engine is ready. One that was unloaded is loaded again.

        Raises: ProviderUnreachable if it has failed, or fails before it is ready.
        """
        if self._ready:
            return
        if self.phase is Phase.FAILED:
            raise ProviderUnreachable(NOT_UP)
        self._wanted.set()
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)

    async def unload(self) -> None:
        """Stops the engine until somebody needs it. It still counts as able to serve: the first job loads it."""
        if not self._ready or self._child is None:
            return
        self._unloading, self._ready = True, False
        self._wanted.clear()  # a job that comes while it stops sets it again
        await self._child.stop()

    def give_up(self) -> None:
        """It is dead though some of it still runs, for seconds perhaps: it gets no more jobs, is ended, and started anew."""
        if not self._ready or self._child is None:
            return
        self._ready = False
        log.warning("engine_died", engine=self._command.name)
        self._tell("the engine died")
        self._child.kill()

    async def aclose(self) -> None:
        """Returns when no process of the engine is left."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        self._settle(ProviderUnreachable(NOT_UP))
        self._command.socket.unlink(missing_ok=True)
        if self._command.scratch is not None:
            shutil.rmtree(self._command.scratch, ignore_errors=True)

    async def _keep_up(self) -> None:
        backoff_s = self._backoff_min_s
        while True:
            await self._wanted.wait()
            began = time.monotonic()
            try:
                await self._run_once()
            except Exception:
                log.exception("engine_not_run", engine=self._command.name)
            self._on_demand, self._unloading = self._unloading, False
            if self._on_demand:
                self._enter(Phase.STOPPED)
                continue
            if time.monotonic() - began > STEADY_AFTER_S:
                backoff_s = self._backoff_min_s
            self._enter(Phase.FAILED)
            said = self._log.recent()
            what_to_do = advice(said)
            self._tell(f"the engine stopped; it is started again in {backoff_s:g} s" + _more(what_to_do))
            self._settle(ProviderUnreachable(NOT_UP))
            log.warning(
                "engine_stopped",
                engine=self._command.name,
                restart_in_s=backoff_s,
                advice=what_to_do,
                cause=cause(said),
                log_file=str(self._log.path),
                tail=self._log.tail(),
            )
            await asyncio.sleep(backoff_s)
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)

    async def _run_once(self) -> None:
        """One life of the engine, from its start to its end. When this returns or raises, nothing of it is left."""
        self._enter(Phase.STARTING)
        child = self._child = await self._spawn()
        starting = asyncio.create_task(self._until_healthy())
        ended = asyncio.create_task(child.exited.wait())
        try:
            await asyncio.wait([starting, ended], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return
            if starting.result():
                self._enter(Phase.READY)
                self._ready = True
                self._tell(None)
                self._settle(None)
                await ended
            else:
                log.warning("engine_start_too_slow", engine=self._command.name, limit_s=self._start_timeout_s)
        finally:
            was_ready, self._ready = self.phase is Phase.READY, False
            starting.cancel()
            ended.cancel()
            await child.aclose(wait_s=STOP_WAIT_S if was_ready else START_STOP_WAIT_S)
            await asyncio.gather(starting, ended, return_exceptions=True)

    async def _spawn(self) -> Child:
        self._log.begin()
        self._command.socket.unlink(missing_ok=True)  # a stale one can't be bound
        log.info("engine_started", engine=self._command.name, log_file=str(self._log.path))
        starting = asyncio.create_task(Child.start(self._command.argv, self._command.environ, self._hear))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await (await starting).aclose()  # a guard that is killed at its birth would leave its command behind
            raise

    async def _until_healthy(self) -> bool:
        until = time.monotonic() + self._start_timeout_s
        while time.monotonic() < until:
            if await self._healthy():
                return True
            await asyncio.sleep(HEALTH_EVERY_S)
        return False

    def _hear(self, data: bytes) -> None:
        self._log.write(data)
        if self.phase not in SETTLED:
            for line in data.decode(errors="replace").splitlines():
                self._enter(phase_after(line, self.phase))

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            log.info("engine_phase", engine=self._command.name, phase=phase.value)
            if phase not in SETTLED and not self._on_demand:
                self._tell(_reason(phase))

    def _settle(self, fault: ProviderUnreachable | None) -> None:
        """Tells the jobs that wait."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None) if fault is None else waiting.set_exception(fault)


def engine_files(name: str, run_folder: str | None) -> tuple[Path, Path, Path | None]:
    """Where the socket and the log of the engine *name* are: in *run_folder*, or in a new folder that is ours alone.

    The third is what has to be removed in the end.

    A socket's path has a limit; where that of the run folder is over it, the socket is elsewhere and the log stays.
    Raises: SetupError if the folder can't be made.
    """
    short = name if len(name) <= NAME_MAX_CHARS else hashlib.sha256(name.encode()).hexdigest()[:HASH_DIGITS]
    plain = re.sub(r"[^A-Za-z0-9_.-]", lambda found: f"={ord(found[0]):x}", short)
    if run_folder is None:
        own = _own_folder()
        return own / "engine.sock", own / f"{plain}.log", own
    folder = Path(run_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SetupError(f"the run folder {folder} can't be made: {error.strerror}") from error
    socket, log_file = folder.absolute() / f"{plain}.sock", folder.absolute() / f"{plain}.log"
    if len(os.fsencode(socket)) <= SOCKET_PATH_MAX_BYTES:
        return socket, log_file, None
    own = _own_folder()
    return own / "engine.sock", log_file, own


def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="penstock-"))


def _reason(phase: Phase) -> str:
    return f"the engine is {phase.value}"


def _more(told: str | None) -> str:
    return "" if told is None else f"; {told}"


def _nobody(_: str | None) -> None:
    """Before `attach`."""
