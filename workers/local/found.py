"""One server that was found on this machine: served from its proof until it is gone.

The loop in `serve` asks it every few seconds for its models, which costs it next to nothing, and keeps the route in step. What
may take long, the real request that proves that it can generate, runs beside it.
Source: docs/adr/0041-what-is-checked.md
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from schemas.errors import Fault, PenstockError, ProviderUnreachable
from schemas.ids import RouteId
from schemas.settings import RouteSettings, WorkerSettings
from workers.local.asker import Asker
from workers.local.kinds import Kind, LocalModel, Models
from workers.local.provider import local_server
from workers.route import Route
from workers.worker import Worker

log = structlog.get_logger()

LOADED_CHECKED_MAX = 4  # of a server's loaded models
TRIED_MAX = 3  # models that may be loaded for one proof, the smallest first
ASK_AGAIN_S = 0.2  # after a connection that was refused or broke
UNAVAILABLE = 503  # a server that is loading its only model


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How often things are done, in seconds."""

    poll_every_s: float = 3.0
    answer_wait_s: float = 2.0
    stranger_every_s: float = 15.0  # somebody else's server is not to be bothered more often
    silent_after_polls: int = 2  # without an answer in time; while it generates for us it may be too busy
    retry_min_s: float = 30.0  # a proof that failed; then twice as long each time
    retry_max_s: float = 600.0


class Found:
    """*checks* bounds how many proofs run at once: they share one GPU, mostly. *on_checked* is called after the first."""

    def __init__(
        self,
        kind: Kind,
        asker: Asker,
        *,
        worker: Worker,
        settings: WorkerSettings,
        route_id: RouteId,
        checks: asyncio.Semaphore,
        pace: Pace,
        on_checked: Callable[[], None],
    ) -> None:
        route = RouteSettings(
            id=route_id, provider="openai", base_url=f"http://{asker.address}/v1", max_concurrency=kind.slots
        )
        self._kind = kind
        self._asker = asker
        self._worker = worker
        self._checks = checks
        self._pace = pace
        self._on_checked = on_checked
        self._wake = asyncio.Event()
        self.provider = local_server(kind.name, route, settings, on_refused=self._wake.set)
        self.route = Route(route, self.provider, (), pool=True)
        self._listed: Models = ()
        self._offered: Models | None = None  # as the worker knows it; None before it knows the route
        self._offering = asyncio.Lock()
        self._proven = False
        self._withheld: frozenset[str] = frozenset()  # what failed its own check, where something else didn't
        self._told: str | None = None
        self._proof: asyncio.Task[None] | None = None
        self._proof_due = 0.0
        self._retry_s = pace.retry_min_s
        self._clock = asyncio.get_running_loop().time

    async def serve(self) -> None:
        """Returns when it is gone. Cancelled, it leaves the route to the worker, which drains."""
        log.info(
            "local_server_found",
            route=self.route.id,
            kind=self._kind.name,
            address=self._asker.address,
            version=self._kind.version,
            slots=self.route.slots,
        )
        try:
            reason = await self._until_gone()
        except Exception:
            await self._leave("watching it failed")
            raise
        finally:
            if self._proof is not None:
                self._proof.cancel()
                await asyncio.gather(self._proof, return_exceptions=True)
        await self._leave(reason)

    async def _until_gone(self) -> str:
        while True:
            try:
                models = await self._ask()
            except Fault as fault:
                return fault.message
            if models is None:
                return "something else answers there"
            try:
                await self._keep_up(models)
                await self.provider.look()
            except PenstockError as error:  # NATS is away at this very moment
                log.warning("local_server_not_announced", route=self.route.id, error=error.message)
            await self._rest(self._pace.poll_every_s)

    async def _ask(self) -> Models | None:
        """Its models. Raises: Fault when it counts as gone: at once if nobody listens, in a while if it is only silent."""
        silent = refused = 0
        while True:
            try:
                return await self._kind.models()
            except ProviderUnreachable:
                refused += 1
                if refused > 1:
                    raise
            except Fault:
                silent += 1
                if silent >= self._pace.silent_after_polls and self.route.free == self.route.slots:
                    raise
            await asyncio.sleep(ASK_AGAIN_S)

    async def _keep_up(self, listed: Models) -> None:
        """Brings the route to what the server lists."""
        changed, self._listed = listed != self._listed, listed
        await self._offer()
        if not listed:
            self._say("it has no model for chat")
            self._on_checked()
            return
        if self._proven:
            self._say(None)
        wanted = not self._proven or bool(self._withheld)
        if wanted and (changed or self._clock() >= self._proof_due) and (self._proof is None or self._proof.done()):
            self._proof = asyncio.create_task(self._prove(listed), name=f"proof-of-{self.route.id}")

    async def _prove(self, models: Models) -> None:
        """Has one token generated by what is loaded; with nothing loaded, by the smallest model that can."""
        try:
            async with self._checks:
                await self._check(await self._kind.with_loaded(models))
        except PenstockError as error:  # it or NATS went away meanwhile
            self._later(error.message)
        except Exception:
            log.exception("local_server_check_broke", route=self.route.id)
            self._later("checking it failed")
        finally:
            self._on_checked()

    async def _check(self, models: Models) -> None:
        failed: dict[str, str] = {}
        passed: list[str] = []
        for model in to_check(models, proven=self._proven):
            try:
                await self.provider.check(model.name)
            except Fault as fault:
                failed[model.public] = f"{model.public}: {fault.message}"
                if fault.status == UNAVAILABLE:
                    self._retry_s = min(self._retry_s, self._pace.poll_every_s)
            else:
                passed.append(model.public)
                if not model.loaded:
                    break
        reason = "; ".join(failed.values())
        if not passed and not self._proven:
            self._later(f"its test request failed: {reason}")
            return
        self._proven = True
        self._withheld = (self._withheld | failed.keys()) - set(passed)
        await self._offer()
        self._say(None)
        if self._withheld:
            self._later(f"not all of it: {reason}" if failed else self._told)
        else:
            self._told = None
        log.info("local_server_served", route=self.route.id, models=list(self.route.names()))

    def _later(self, reason: str | None) -> None:
        """Checks again, with a longer break each time; the reason is logged once."""
        if not self._proven:
            self._say(reason)
        if reason != self._told:
            log.warning("local_server_not_served", route=self.route.id, reason=reason, again_in_s=self._retry_s)
        self._told = reason
        self._proof_due = self._clock() + self._retry_s
        self._retry_s = min(2 * self._retry_s, self._pace.retry_max_s)

    def _say(self, down: str | None) -> None:
        if self._offered is not None and down != self.provider.down:
            self.provider.say(down)

    async def _offer(self) -> None:
        async with self._offering:  # the proof and the poll may both have something new
            models = tuple(model for model in self._listed if model.public not in self._withheld)
            if models == self._offered:
                return
            named = self.provider.serve(models)
            if self._offered is None:
                self.route.models = named
                await self._worker.add(self.route)
            else:
                await self._worker.offer(self.route.id, named)
                old, new = ({model.public for model in each} for each in (self._offered, models))
                log.info(
                    "local_models_changed", route=self.route.id, added=sorted(new - old), removed=sorted(old - new)
                )
            self._offered = models

    async def _rest(self, seconds: float) -> None:
        """Until the next poll; a job that found nobody listening ends it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _leave(self, reason: str) -> None:
        log.info("local_server_gone", route=self.route.id, address=self._asker.address, reason=reason)
        if self._offered is not None:
            await self._worker.remove(self.route.id)


def to_check(models: Models, *, proven: bool) -> list[LocalModel]:
    """Who is to generate a token: all that is loaded, which costs next to nothing; else the smallest, in turn until one can.

    For the sake of a server that is *proven* nothing is loaded.
    """
    loaded = [model for model in models if model.loaded]
    if loaded or proven:
        return loaded[:LOADED_CHECKED_MAX]
    return sorted(models, key=lambda model: (model.size is None, model.size or 0))[:TRIED_MAX]
