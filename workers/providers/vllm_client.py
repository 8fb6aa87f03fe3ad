"""The HTTP client of a vLLM, configured or found: asks once what it can do, and has answers begun elsewhere gone on with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from schemas.errors import NotContinued
from schemas.jobs import Continues, EngineStats, Job, ModelFingerprint
from workers.engine.fingerprint import fingerprint_of
from workers.providers.base import Chunk
from workers.providers.openai import OpenAI
from workers.providers.openai_chunks import ChunkReader
from workers.providers.prefill import prefilled, read_request
from workers.providers.vllm_chunks import VllmChunkReader
from workers.providers.vllm_continuation import why_not_exact
from workers.providers.vllm_onward import find_seam, go_on
from workers.providers.vllm_powers import ONWARD, Powers, empowered, probe
from workers.providers.vllm_server import VllmServer


class VllmClient(OpenAI):
    """Its `__init__` is its base's; before anything else `_ask_at` says where the server's own questions go."""

    powers: Powers
    _server: VllmServer
    _fingerprint: ModelFingerprint | None
    _detokenizes: bool

    def _ask_at(self, server: VllmServer) -> None:
        self.powers, self._server = Powers(), server
        self._fingerprint, self._detokenizes = None, False

    async def _learn(self, model: str, *, served: str | None) -> None:
        """A real one-token request of *model* tells what can be had; *served* is what the engine was told to serve, if known.

        Raises: Fault.
        """
        self.powers = await probe(self, model)
        await self._server.learn(model)
        self._detokenizes = await self._server.text_of(model, (1,)) is not None
        self._fingerprint = await asyncio.to_thread(fingerprint_of, served or self._server.root or model)

    def fingerprint(self, model: str) -> ModelFingerprint | None:  # noqa: ARG002 - an engine serves one
        return self._fingerprint

    def continues(self, model: str) -> Continues:  # noqa: ARG002 - an engine serves one
        if self._exact:
            return Continues.EXACT
        return Continues.PREFIX if self.powers.prefix else Continues.NO

    def stats(self) -> EngineStats | None:
        return self._server.stats

    def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        return super().generate(job) if job.continuation is None else self._go_on(job)

    async def aclose(self) -> None:
        await super().aclose()
        await self._server.aclose()

    def _reader(self) -> ChunkReader:
        return VllmChunkReader() if self.powers.token_ids else ChunkReader()

    def _body(self, job: Job) -> bytes:
        return empowered(super()._body(job), self.powers)

    async def _go_on(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """Behind the tokens where they are known and all is understood that was asked, else behind the text. Raises: Fault."""
        before, request = job.continuation, read_request(job)
        assert before is not None  # noqa: S101 - it is what this is for
        model = self.upstream_model(job.model)
        seam = None
        if self._exact and why_not_exact(job, request) is None:
            seam = await find_seam(self._server, model, before)
        if seam is not None:
            chunks = go_on(
                job,
                request,
                seam,
                server=self._server,
                upstream=self._upstream,
                patience=self._patience(job),
                upstream_model=model,
                context_tokens=self._server.context_tokens or 0,
                max_event_bytes=self._settings.max_event_bytes,
            )
        elif not (before.text or before.reasoning):
            chunks = super().generate(job)  # nothing of it was told yet
        elif self.powers.prefix:
            chunks = super().generate(prefilled(job, before, members=ONWARD))
        else:
            raise NotContinued
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    @property
    def _exact(self) -> bool:
        return self.powers.token_ids and self._detokenizes and self._server.context_tokens is not None
