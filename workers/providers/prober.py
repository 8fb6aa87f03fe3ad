"""Asks again what was taken out: a dead key, or a provider that is down. One answer brings it back.

A probe is a real request for one token, by the way that a job's would go: what a list of models says, many servers say to anybody.
Nobody is billed for it here. It runs while something is out, and only then.
Source: docs/adr/0053-health.md
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping

import msgspec
import structlog
from msgspec import Raw

from schemas.errors import Fault, ProviderAuth, ProviderRateLimited, ProviderRejected, ProviderTimeout
from schemas.ids import IngressId, KeyId, OrgId, RequestId, RouteId, new_id, new_nonce
from schemas.jobs import Job, Timeouts
from schemas.settings import RouteSettings
from workers.providers.account import Account
from workers.providers.base import Provider
from workers.providers.health import Health
from workers.providers.keys import Grant, Key, KeyRing
from workers.providers.retries import Verdict, dead_reason, is_unwell, verdict

log = structlog.get_logger()

PROBE_TIMEOUT_S = 30.0
LOOK_EVERY_S = 1.0  # whether a dead key's file holds another one


class Prober:
    """*hear* says whose answer is heard in the present task; *on_change* is called after each probe."""

    def __init__(
        self,
        ring: KeyRing,
        health: Health,
        accounts: Mapping[int, Account],
        *,
        route: RouteSettings,
        clock: Callable[[], float],
        hear: Callable[[Grant], object],
        on_change: Callable[[], None],
    ) -> None:
        """*accounts* are by their keys' identity."""
        self.model = route.models[0].name if route.models else None  # what is asked for
        self._ring = ring
        self._health = health
        self._accounts = accounts
        self._route: RouteId = route.id
        self._clock = clock
        self._hear = hear
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def wake(self) -> None:
        """Begins to probe, if something is out."""
        if (self._task is None or self._task.done()) and not self._closed and self._due() is not None:
            self._task = asyncio.create_task(self._run(), name=f"probe-{self._route}")

    async def aclose(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while (due := self._due()) is not None:
            await asyncio.sleep(min(max(0.0, due - self._clock()), LOOK_EVERY_S))
            try:
                await self._round()
            except Exception:
                log.exception("probe_broke", route=self._route)
                await asyncio.sleep(LOOK_EVERY_S)

    def _due(self) -> float | None:
        """When the next probe is; None if all is well."""
        times = [key.backoff.at for key in self._ring.keys if key.backoff is not None]
        if self._health.probe_at is not None and any(key.dead is None for key in self._ring.keys):
            times.append(self._health.probe_at)
        return min(times, default=None)

    async def _round(self) -> None:
        """Probes whatever it is time for."""
        for key in self._ring.keys:
            if key.backoff is not None and await self._accounts[id(key)].renewed():
                key.backoff.at_once(self._clock())
        now = self._clock()
        probes = [self._probe_key(key) for key in self._ring.keys if key.backoff is not None and key.backoff.at <= now]
        if self._health.probe_at is not None and self._health.probe_at <= now:
            alive = [key for key in self._ring.keys if key.dead is None]
            if alive:
                probes.append(self._probe_health(min(alive, key=lambda key: key.cools_until)))
        if probes:
            await asyncio.gather(*probes)
            self._on_change()

    async def _probe_key(self, key: Key) -> None:
        fault = await self._ask(key)
        now = self._clock()
        if fault is None or verdict(fault) is Verdict.COOL:
            log.info("provider_key_back", route=self._route, key=key.label)
            self._ring.revive(key)
            if fault is not None:  # it is taken, only not now
                self._ring.limit(now, key, fault.retry_after_s)
        else:
            killed = verdict(fault) is Verdict.KILL
            self._ring.kill(now, key, dead_reason(fault) if killed else key.dead or "refused")

    async def _probe_health(self, key: Key) -> None:
        began = self._clock()
        fault = await self._ask(key)
        now = self._clock()
        if isinstance(fault, ProviderAuth):
            self._ring.kill(now, key, dead_reason(fault))
        if isinstance(fault, ProviderRateLimited):
            self._ring.limit(now, key, fault.retry_after_s)
        unwell = fault is not None and (
            isinstance(fault, ProviderAuth) or is_unwell(fault, waited_s=0.0, patience_s=0.0)
        )
        self._health.probed(now, answer_s=None if unwell else now - began)
        log.info("provider_probed", route=self._route, code=None if fault is None else fault.code)

    async def _ask(self, key: Key) -> Fault | None:
        """What a probe with *key* ends with; None if it is answered, and be it that the request is no good."""
        provider = self._accounts[id(key)].provider
        if provider is None:
            return ProviderAuth("The key can't be read.")
        grant = self._ring.probe(self._clock(), key)
        self._hear(grant)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._asked(provider)
        except ProviderRejected:
            return None
        except Fault as fault:
            return fault
        except TimeoutError:
            return ProviderTimeout()
        finally:
            self._ring.ended(grant, None)
        return None

    async def _asked(self, provider: Provider) -> None:
        """Raises: Fault."""
        if self.model is None:
            await provider.models()
            return
        async with contextlib.aclosing(provider.generate(self._job(self.model))) as chunks:
            async for _ in chunks:
                pass

    def _job(self, model: str) -> Job:
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": False}
        nobody = "probe"
        return Job(
            request_id=RequestId(new_id()),
            epoch=1,
            ingress=IngressId(nobody),
            nonce=new_nonce(),
            org=OrgId(nobody),
            key_id=KeyId(nobody),
            model=model,
            route=self._route,
            stream=False,
            accepted_ns=0,
            timeouts=Timeouts(first_token_s=PROBE_TIMEOUT_S, idle_s=PROBE_TIMEOUT_S, total_s=PROBE_TIMEOUT_S),
            body=Raw(msgspec.json.encode(body)),
        )
