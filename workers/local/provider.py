"""A server on this machine as a provider: OpenAI's, with models that come and go, and an ear for refused connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

import msgspec
from msgspec import Raw

from schemas.errors import ProviderFailed, ProviderNonsense, ProviderUnreachable
from schemas.ids import IngressId, KeyId, OrgId, RequestId, new_id, new_nonce
from schemas.jobs import Job, Timeouts
from schemas.money import Price
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from workers.local.kinds import Models
from workers.providers.base import Chunk, Tell
from workers.providers.habits import say_max_tokens
from workers.providers.openai import OpenAI
from workers.providers.vllm_client import VllmClient
from workers.providers.vllm_server import Health, VllmServer

LOOK_EVERY_S = 10.0
DIED = "the engine died"
CHECK_WAIT_S = 120.0  # a model may have to be read from a slow disk first

_members = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.encode


class LocalServer(OpenAI):
    """*on_refused* is called when a job found nobody listening."""

    def __init__(self, route: RouteSettings, settings: WorkerSettings, *, on_refused: Callable[[], None]) -> None:
        assert route.base_url is not None  # noqa: S101 - it was found there
        super().__init__(route.base_url, max_concurrency=route.slots + 1, settings=settings)  # one for checks
        self._route = route
        self._on_refused = on_refused
        self._tell: Tell = lambda _: None
        self.down: str | None = "it is being checked"

    def attach(self, tell: Tell) -> None:
        self._tell = tell
        tell(self.down)

    def say(self, down: str | None) -> None:
        """Why it can't serve at the moment; None if it can."""
        self.down = down
        self._tell(down)

    def serve(self, models: Models) -> tuple[ModelSettings, ...]:
        """Knows these models from now on; what they are called here."""
        named = {model.public: model.name for model in models}
        self._upstream_names = named
        return tuple(
            ModelSettings(name=public, upstream=upstream, price=Price()) for public, upstream in sorted(named.items())
        )

    async def look(self) -> None:
        """Asks for what else the server tells of itself. Called with each poll."""

    async def check(self, upstream: str) -> None:
        """A real request for one token, by the way that a job's would go.

        Raises: Fault if it isn't answered.
        """
        async with contextlib.aclosing(super().generate(self._checking(upstream))) as chunks:
            async for _ in chunks:
                pass

    async def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        try:
            async with contextlib.aclosing(super().generate(job)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ProviderUnreachable:
            self._on_refused()
            raise

    def _body(self, job: Job) -> bytes:
        members = _members(super()._body(job))
        say_max_tokens(members)
        return _encode(members)

    def _checking(self, upstream: str) -> Job:
        body = {"model": upstream, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": False}
        nobody = "check"
        return Job(
            request_id=RequestId(new_id()),
            epoch=1,
            ingress=IngressId(nobody),
            nonce=new_nonce(),
            org=OrgId(nobody),
            key_id=KeyId(nobody),
            model=upstream,
            route=self._route.id,
            stream=False,
            accepted_ns=0,
            timeouts=Timeouts(first_token_s=CHECK_WAIT_S, idle_s=CHECK_WAIT_S, total_s=CHECK_WAIT_S),
            body=Raw(_encode(body)),
        )


class LocalVllm(VllmClient, LocalServer):
    """A vLLM: what only that can do is asked for as of a configured one, and it says itself how much room it has."""

    name = "vllm"

    def __init__(self, route: RouteSettings, settings: WorkerSettings, *, on_refused: Callable[[], None]) -> None:
        super().__init__(route, settings, on_refused=on_refused)
        assert route.base_url is not None  # noqa: S101 - it was found there
        self._ask_at(VllmServer(route.base_url, {}, settings=settings, sequences_max=route.slots))
        self._died = False
        self._look_at = 0.0
        self._clock = asyncio.get_running_loop().time

    def say(self, down: str | None) -> None:
        """A front end whose engine died still names its models, for seconds."""
        super().say(DIED if self._died and down is None else down)

    def slots(self) -> int | None:
        return self._server.room

    async def check(self, upstream: str) -> None:
        await self._learn(upstream, served=None)

    async def look(self) -> None:
        """Every few polls: each question is a line in its owner's log."""
        if not self._died and self._clock() < self._look_at:
            return
        self._look_at = self._clock() + LOOK_EVERY_S
        self._died = await self._server.health() is Health.DEAD
        if not self._died:
            await self._server.look()

    async def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        try:
            async with contextlib.aclosing(super().generate(job)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (ProviderFailed, ProviderNonsense):
            if await self._server.health() is Health.DEAD:
                self._died = True
                self.say(DIED)
            raise


BY_KIND: dict[str, type[LocalServer]] = {"vllm": LocalVllm}


def local_server(
    kind: str, route: RouteSettings, settings: WorkerSettings, *, on_refused: Callable[[], None]
) -> LocalServer:
    """The provider for a server that was recognised as one of *kind*."""
    return BY_KIND.get(kind, LocalServer)(route, settings, on_refused=on_refused)
