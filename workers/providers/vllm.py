"""vLLM: one that already runs (``base_url``), or one that this worker runs itself on a Unix socket.

Both are the same HTTP client. What only vLLM can do is switched on by asking the server for it once, never by a name in
the configuration: another server behind the same address simply doesn't do it.
Source: docs/adr/0050-vllm.md
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import structlog

from schemas.errors import Fault, ProviderFailed, ProviderNonsense, ProviderUnreachable, SetupError
from schemas.jobs import Job
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from workers.engine.engine import Engine, EngineCommand, engine_files
from workers.providers.base import Chunk, Tell
from workers.providers.openai import address, first_key
from workers.providers.vllm_client import VllmClient
from workers.providers.vllm_cores import cores_without_gpu, on_few_cores
from workers.providers.vllm_metrics import SEQUENCES_MAX
from workers.providers.vllm_server import Health, VllmServer

log = structlog.get_logger()

LOOK_EVERY_S = 5.0
DOUBT_WAIT_S = (
    0.2  # a job that failed is not told of it before its engine was asked for its health, but no later than this
)
A_PATH_BEGINS = ("/", "./", "../", "~")
SOCKETS_MAX = 1024  # where the engine itself says how much it has room for
IDLE_LOOK_EVERY_S = 1.0
DEFAULTS = (
    "--disable-uvicorn-access-log",
    "--enable-prompt-tokens-details",  # how much of a prompt came from the cache, in each usage
    *("--scheduling-policy", "priority"),  # with equal priorities it is first come, first served
)
ENGINE_URL = "http://vllm/v1"  # of no consequence: the socket decides


class Vllm(VllmClient):
    name = "vllm"

    def __init__(
        self,
        base_url: str,
        models: tuple[ModelSettings, ...],
        *,
        served: str,
        key: str | None = None,
        max_concurrency: int | None,
        settings: WorkerSettings,
        engine: Engine | None = None,
        socket: Path | None = None,
        idle_unload_s: float = 0.0,
        sequences_max: int = SEQUENCES_MAX,
    ) -> None:
        """Without *max_concurrency* the engine says itself how much it has room for; *sequences_max* is its own limit."""
        super().__init__(
            base_url, models, key=key, max_concurrency=max_concurrency or SOCKETS_MAX, settings=settings, socket=socket
        )
        self._ask_at(
            VllmServer(
                base_url,
                {} if key is None else self._key_headers(key),
                settings=settings,
                socket=socket,
                sequences_max=sequences_max,
            )
        )
        self._says_room = max_concurrency is None
        self._served = served
        self._engine = engine
        self._idle_unload_s = idle_unload_s
        self._running = 0
        self._idle_since = time.monotonic()
        self._tell: Tell = lambda _: None
        self._tasks: list[asyncio.Task[None]] = []
        self._probing: asyncio.Task[None] | None = None
        self._doubting: asyncio.Task[None] | None = None
        self._doubted = asyncio.Event()

    @classmethod
    def from_route(cls, route: RouteSettings, settings: WorkerSettings) -> Vllm:
        """Raises: SetupError if the route can't work as it is written, or vLLM isn't installed here."""
        if not route.models:
            raise SetupError(f"route {route.id!r}: name the model in [[routes.models]]")
        if len(route.api_keys) > 1:
            raise SetupError(f"route {route.id!r}: a server of your own has one limit, so name one key for it")
        served = route.vllm.model or route.models[0].upstream_name
        if route.base_url is not None:
            return cls(
                address(route),
                route.models,
                served=served,
                key=first_key(route),
                max_concurrency=route.max_concurrency,
                settings=settings,
            )
        if served.startswith(A_PATH_BEGINS) and not Path(served).is_dir():
            raise SetupError(
                f"route {route.id!r}: there is no folder {served}. A model is a folder or a Hugging Face name."
            )
        command = _serve_command(route, served, engine_files(route.id, settings.run_folder))
        engine = Engine(command, healthy=_Health(command.socket), start_timeout_s=route.vllm.start_timeout_s)
        return cls(
            ENGINE_URL,
            route.models,
            served=served,
            max_concurrency=route.max_concurrency,
            settings=settings,
            engine=engine,
            socket=command.socket,
            idle_unload_s=route.vllm.idle_unload_s,
            sequences_max=sequences_max(route),
        )

    @property
    def engine(self) -> Engine | None:
        return self._engine

    def slots(self) -> int | None:
        return self._server.room if self._says_room else None

    def attach(self, tell: Tell) -> None:
        """Starts the engine if it is ours; either way the server is asked what it can do before a job is taken."""
        self._tell = tell
        tell("the engine is not ready yet")
        if self._engine is not None:
            self._engine.attach(self._on_engine)
            self._tasks.append(asyncio.create_task(self._look_regularly(self._engine), name="vllm-look"))
            if self._idle_unload_s > 0:
                self._tasks.append(asyncio.create_task(self._unload_when_idle(self._engine), name="vllm-idle"))
        else:
            self._tasks.append(asyncio.create_task(self._watch(), name="vllm-watch"))

    async def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        self._running += 1
        try:
            if self._engine is not None:
                await self._engine.need()
            async with contextlib.aclosing(super().generate(job)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (ProviderFailed, ProviderUnreachable, ProviderNonsense):
            await self._doubt()
            raise
        finally:
            self._running -= 1
            self._idle_since = time.monotonic()

    async def aclose(self) -> None:
        tasks = [*self._tasks, *(task for task in (self._probing, self._doubting) if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().aclose()
        if self._engine is not None:
            await self._engine.aclose()

    def _on_engine(self, reason: str | None) -> None:
        """Our engine's word. A fresh one is probed before it takes jobs."""
        if self._probing is not None:
            self._probing.cancel()  # what it would find is no longer so
        self._server.stats = None
        if reason is not None:
            self._tell(reason)
        else:
            self._probing = asyncio.create_task(self._probe_until_known(), name="vllm-probe")

    async def _watch(self) -> None:
        """For a server that is not ours: whether it is there, and what it can do."""
        while True:
            await self._probe_until_known()
            while await self._is_there():
                self._doubted.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_EVERY_S):
                        await self._doubted.wait()
            self._server.stats = None
            self._tell("the server does not answer")

    async def _probe_until_known(self) -> None:
        """A real one-token request that asks for token ids: what comes back tells whether they can be had."""
        self._running += 1  # an engine that is being asked is not idle
        model = self.upstream_model(next(iter(self._upstream_names)))
        try:
            while True:
                try:
                    await self._learn(model, served=self._served)
                    break
                except Fault as fault:
                    self._tell(f"the server failed its test request: {fault.message}")
                    await asyncio.sleep(LOOK_EVERY_S)
        finally:
            self._running -= 1
            self._idle_since = time.monotonic()
        powers = self.powers
        log.info("vllm_ready", token_ids=powers.token_ids, priority=powers.priority, room=self._server.room)
        self._tell(None)

    async def _is_there(self) -> bool:
        """A server that isn't vLLM has no word for its health: then it is there if it names its models."""
        health = await self._server.health()
        if health is Health.UP:
            await self._server.look()
        if health is not Health.UNKNOWN:
            return health is Health.UP
        try:
            await self.models()
        except Fault:
            return False
        return True

    async def _doubt(self) -> None:
        """A job failed at the engine's end: if that was the engine's own end, no other job may go there."""
        if self._doubting is None or self._doubting.done():
            self._doubting = asyncio.create_task(self._look_for_life(), name="vllm-doubt")
        await asyncio.wait((self._doubting,), timeout=DOUBT_WAIT_S)

    async def _look_for_life(self) -> None:
        if await self._server.health() is not Health.DEAD:
            return
        if self._engine is not None:
            self._engine.give_up()
        else:
            self._tell("the engine died")
            self._doubted.set()

    async def _look_regularly(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if engine.is_ready:
                await self._server.look()
            else:
                self._server.stats = None

    async def _unload_when_idle(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(IDLE_LOOK_EVERY_S)
            idle_s = time.monotonic() - self._idle_since
            if self._running == 0 and idle_s > self._idle_unload_s and engine.is_ready:
                log.info("engine_unloaded", idle_s=round(idle_s))
                await engine.unload()


class _Health:
    """GET /health over the engine's socket, with nothing but a socket: it is asked ten times a second."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def __call__(self) -> bool:
        try:
            async with asyncio.timeout(2.0):
                reader, writer = await asyncio.open_unix_connection(str(self._socket))
                try:
                    writer.write(b"GET /health HTTP/1.1\r\nhost: vllm\r\nconnection: close\r\n\r\n")
                    return (await reader.readline()).split()[1:2] == [b"200"]
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False


def _serve_command(route: RouteSettings, served: str, files: tuple[Path, Path, Path | None]) -> EngineCommand:
    """`vllm serve`, with what a worker needs said first and the operator's flags last, where they win."""
    command = _vllm_command(route)
    socket, log_file, scratch = files
    gpus = [gpu for gpu in (route.vllm.gpus or "").split(",") if gpu]
    parallel = ("--tensor-parallel-size", str(len(gpus))) if len(gpus) > 1 else ()
    return EngineCommand(
        name=route.id,
        argv=(
            *command,
            "serve",
            served,
            *("--uds", str(socket)),
            *("--served-model-name", *(model.upstream_name for model in route.models)),
            *("--max-num-seqs", str(route.max_concurrency or SEQUENCES_MAX)),
            *DEFAULTS,
            *parallel,
            *route.vllm.args,
        ),
        socket=socket,
        log_file=log_file,
        scratch=scratch,
        environ={
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_API_KEY": "",  # only we can reach its socket; a key of the environment would keep us out
            **_for_this_machine(gpus),
            **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            **route.vllm.environ,
        },
    )


def _for_this_machine(gpus: list[str]) -> dict[str, str]:
    cores = None if gpus else cores_without_gpu()
    return {} if cores is None else on_few_cores(cores, os.environ)


def sequences_max(route: RouteSettings) -> int:
    """The engine's ``--max-num-seqs``: the last one said counts."""
    found = SEQUENCES_MAX if route.max_concurrency is None else route.max_concurrency
    args = route.vllm.args
    for at, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name.replace("_", "-") == "--max-num-seqs":
            said = value or "".join(args[at + 1 : at + 2])
            found = int(said) if said.isdecimal() and int(said) > 0 else found
    return found


def _vllm_command(route: RouteSettings) -> tuple[str, ...]:
    """Raises: SetupError if vLLM isn't here."""
    first, *rest = route.vllm.command
    beside = Path(sys.executable).parent / first  # the same environment, also where its bin is not on the PATH
    found = shutil.which(first) or (str(beside) if beside.exists() else None)
    if found is None:
        raise SetupError(
            f"route {route.id!r}: {first} is not installed here. `pip install 'penstock[vllm]'` brings vLLM; "
            "or name a running server with base_url."
        )
    return (found, *rest)
