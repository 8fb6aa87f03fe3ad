"""A provider of the table in schemas/providers.toml: OpenAI's API with the habits that the table tells."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from schemas.errors import SetupError
from schemas.jobs import Continues, Job
from schemas.money import Usage
from schemas.providers import KnownProvider
from schemas.routes import completed
from schemas.settings import RouteSettings, WorkerSettings
from workers.providers.base import Chunk
from workers.providers.openai import OpenAI, address, first_key, rewritten
from workers.providers.prefill import MARKS, prefilled


class Known(OpenAI):
    def __init__(
        self, known: KnownProvider, route: RouteSettings, *, key: str | None, settings: WorkerSettings
    ) -> None:
        self._known = known
        super().__init__(
            address(route),
            route.models,
            key=key,
            headers=route.headers,
            max_concurrency=route.slots,
            settings=settings,
        )
        self.name = route.provider

    @classmethod
    def of(cls, known: KnownProvider, route: RouteSettings, settings: WorkerSettings) -> Known:
        """Raises: SetupError if the route can't work as it is written."""
        route = completed(route, os.environ)
        if route.base_url is None:
            raise SetupError(f"route {route.id!r}: {known.title} has no common address: base_url must be given")
        return cls(known, route, key=first_key(route), settings=settings)

    def continues(self, model: str) -> Continues:  # noqa: ARG002
        return Continues.PREFIX if self._known.prefill in MARKS else Continues.NO

    def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """Raises: as its parent, and NotContinued."""
        before = job.continuation
        if before is not None and (before.text or before.reasoning):
            job = prefilled(job, before, mark=MARKS[self._known.prefill])
        chunks = super().generate(job)
        return _with_reasoning(chunks) if self._known.reasoning_apart else chunks

    def _key_headers(self, key: str) -> dict[str, str]:
        return {"api-key": key} if self._known.key_header == "api-key" else super()._key_headers(key)

    def _body(self, job: Job) -> bytes:
        return rewritten(job, self.upstream_model(job.model), ask_usage=self._known.takes_stream_options)


async def _with_reasoning(chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """Counts the reasoning as completion tokens, for a provider that tells the two apart."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield chunk if chunk.usage is None else msgspec.structs.replace(chunk, usage=_counted_in(chunk.usage))


def _counted_in(usage: Usage) -> Usage:
    return msgspec.structs.replace(usage, completion_tokens=usage.completion_tokens + usage.reasoning_tokens)
