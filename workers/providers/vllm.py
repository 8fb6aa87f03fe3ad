"""vLLM: one that already runs (``base_url``), or one that this worker runs itself on a Unix socket.

Both are the same HTTP client. What only vLLM can do is switched on by asking the server for it once, never by a name in
the configuration: another server behind the same address simply doesn't do it.
Source: docs/adr/0050-vllm.md
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec import Raw

from schemas.errors import Fault, ProviderRejected, SetupError
from schemas.jobs import Job, ModelFingerprint
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from workers.engine.engine import Engine, EngineCommand, engine_files
from workers.engine.fingerprint import fingerprint_of
from workers.providers.base import Chunk, Tell
from workers.providers.openai import OpenAI, address, first_key, rewritten
from workers.providers.openai_chunks import ChunkReader
from workers.providers.vllm_chunks import VllmChunkReader

log = structlog.get_logger()

PROBE_TIMEOUT_S = 60.0  # the first answer of a fresh engine may compile something
PROBE_EVERY_S = 5.0
PROBE_BYTES_MAX = 1024 * 1024
IDLE_LOOK_EVERY_S = 1.0
ENGINE_URL = "http://vllm/v1"  # of no consequence: the socket decides

_members = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.encode
_TRUE = Raw(b"true")


@dataclass(frozen=True, slots=True)
class Powers:
    """What the server turned out to be able to do."""

    token_ids: bool = False


class Vllm(OpenAI):
    name = "vllm"

    def __init__(
        self,
        base_url: str,
        models: tuple[ModelSettings, ...],
        *,
        served: str,
        key: str | None = None,
        max_concurrency: int,
        settings: WorkerSettings,
        engine: Engine | None = None,
        socket: Path | None = None,
        idle_unload_s: float = 0.0,
    ) -> None:
        super().__init__(base_url, models, key=key, max_concurrency=max_concurrency, settings=settings, socket=socket)
        self.powers = Powers()
        self._served = served
        self._engine = engine
        self._idle_unload_s = idle_unload_s
        self._running = 0
        self._idle_since = time.monotonic()
        self._tell: Tell = lambda _: None
        self._tasks: list[asyncio.Task[None]] = []
        self._probing: asyncio.Task[None] | None = None
        self._fingerprint: ModelFingerprint | None = None

    @classmethod
    def from_route(cls, route: RouteSettings, settings: WorkerSettings) -> Vllm:
        """Raises: SetupError if the route can't work as it is written, or vLLM isn't installed here."""
        if not route.models:
            raise SetupError(f"route {route.id!r}: name the model in [[routes.models]]")
        served = route.vllm.model or route.models[0].upstream_name
        if route.base_url is not None:
            return cls(
                address(route),
                route.models,
                served=served,
                key=first_key(route),
                max_concurrency=route.slots,
                settings=settings,
            )
        socket, log_file = engine_files(route.id, settings.run_folder)
        command = _serve_command(route, served, socket, log_file)
        engine = Engine(command, healthy=_Health(socket), start_timeout_s=route.vllm.start_timeout_s)
        return cls(
            ENGINE_URL,
            route.models,
            served=served,
            max_concurrency=route.slots,
            settings=settings,
            engine=engine,
            socket=socket,
            idle_unload_s=route.vllm.idle_unload_s,
        )

    @property
    def engine(self) -> Engine | None:
        return self._engine

    def fingerprint(self, model: str) -> ModelFingerprint | None:  # noqa: ARG002 - an engine serves one
        return self._fingerprint

    def attach(self, tell: Tell) -> None:
        """Starts the engine if it is ours; either way the server is asked what it can do before a job is taken."""
        self._tell = tell
        tell("the engine is not ready yet")
        if self._engine is not None:
            self._engine.attach(self._on_engine)
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
        finally:
            self._running -= 1
            self._idle_since = time.monotonic()

    async def aclose(self) -> None:
        tasks = [*self._tasks, *([] if self._probing is None else [self._probing])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().aclose()
        if self._engine is not None:
            await self._engine.aclose()

    def _reader(self) -> ChunkReader:
        return VllmChunkReader() if self.powers.token_ids else ChunkReader()

    def _body(self, job: Job) -> bytes:
        body = rewritten(job, self.upstream_model(job.model))
        if not self.powers.token_ids:
            return body
        members = _members(body)
        members["return_token_ids"] = _TRUE
        return _encode(members)

    def _on_engine(self, reason: str | None) -> None:
        """Our engine's word. A fresh one is probed before it takes jobs."""
        if self._probing is not None:
            self._probing.cancel()  # what it would find is no longer so
        if reason is not None:
            self._tell(reason)
        else:
            self._probing = asyncio.create_task(self._probe_until_known(), name="vllm-probe")

    async def _watch(self) -> None:
        """For a server that is not ours: whether it is there, and what it can do."""
        while True:
            await self._probe_until_known()
            while await self._answers():  # noqa: ASYNC110 - there is no event: it is asked
                await asyncio.sleep(PROBE_EVERY_S)
            self._tell("the server does not answer")

    async def _probe_until_known(self) -> None:
        """A real one-token request that asks for token ids: what comes back tells whether they can be had."""
        self._running += 1  # an engine that is being asked is not idle
        try:
            while True:
                try:
                    self.powers = await self._probe()
                    break
                except Fault as fault:
                    self._tell(f"the server failed its test request: {fault.message}")
                    await asyncio.sleep(PROBE_EVERY_S)
            self._fingerprint = await asyncio.to_thread(fingerprint_of, self._served)
        finally:
            self._running -= 1
            self._idle_since = time.monotonic()
        log.info("vllm_ready", token_ids=self.powers.token_ids)
        self._tell(None)

    async def _probe(self) -> Powers:
        """Raises: Fault."""
        asked: dict[str, Any] = {
            "model": self.upstream_model(next(iter(self._upstream_names))),
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1,
        }
        try:
            answer = await self._fetch("POST", "/chat/completions", _encode({**asked, "return_token_ids": True}))
        except ProviderRejected:  # perhaps only for what it doesn't know
            await self._fetch("POST", "/chat/completions", _encode(asked))
            return Powers()
        return Powers(token_ids=b'"token_ids":[' in answer)

    async def _answers(self) -> bool:
        try:
            await self._fetch("GET", "/models")
        except Fault:
            return False
        return True

    async def _fetch(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Raises: Fault."""
        return await self.fetch(method, path, body=body, within_s=PROBE_TIMEOUT_S, max_bytes=PROBE_BYTES_MAX)

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


def _serve_command(route: RouteSettings, served: str, socket: Path, log_file: Path) -> EngineCommand:
    """`vllm serve`, with what a worker needs said first and the operator's flags last, where they win."""
    command = _vllm_command(route)
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
            *("--max-num-seqs", str(route.slots)),
            "--disable-uvicorn-access-log",
            *parallel,
            *route.vllm.args,
        ),
        socket=socket,
        log_file=log_file,
        environ={
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_API_KEY": "",  # only we can reach its socket; a key of the environment would keep us out
            **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            **route.vllm.environ,
        },
    )


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
