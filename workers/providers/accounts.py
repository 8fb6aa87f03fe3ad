"""A provider with several keys, used as one: each try gets a key that has room, and a fault decides about the next try.

Each key is an *account*: the provider as it would be with that key alone. What is decided is decided by pure parts: keys.py says
which key, pace.py what has room, retries.py whether again, health.py whether the route is down. This file does it, and tells
the worker. prober.py asks again whatever was taken out.
Source: docs/adr/0051-keys-of-a-route.md, docs/adr/0052-limits.md, docs/adr/0053-health.md
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import msgspec
import structlog

from schemas.errors import Fault, ProviderAuth, ProviderRateLimited, ProviderRejected
from schemas.ids import Nonce
from schemas.jobs import Continues, EngineStats, Job, ModelFingerprint
from schemas.providers import RateLimitHeaders
from schemas.settings import RouteSettings, WorkerSettings
from schemas.standing import Standing
from workers.providers.account import open_accounts
from workers.providers.base import Chunk, Hold, Provider, Tell
from workers.providers.health import Dice, Health, HealthRules
from workers.providers.keys import Grant, Key, KeyRing, KeyRules, Wait
from workers.providers.pace import Expected, prompt_tokens
from workers.providers.prober import Prober
from workers.providers.rate_headers import told_requests, told_tokens
from workers.providers.retries import Tries, Verdict, dead_reason, is_unwell, verdict

log = structlog.get_logger()

HOLD_FROM_S = 0.5  # a shorter wait for a limit is waited here
DOWN_FROM_S = 90.0  # a longer one is not for jobs in the queue to wait
REST_MIN_S = 0.5  # with less time left nothing is tried again
TRIFLE_S = 0.01  # of a job's time-outs
LOOK_EVERY_S = 1.0  # while waiting: a key may have come back
PROMISE_S = 30.0  # a grant for a job that never began
TIMEOUT_COUNTS_S = 9.0  # a provider that is silent for less is not unwell: the client may have been in a hurry

_grant: ContextVar[Grant | None] = ContextVar("grant", default=None)  # of the try whose answer is being heard

Make = Callable[[RouteSettings], Provider]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How patient it is; and the dice, and the clock in monotonic seconds."""

    keys: KeyRules = field(default_factory=KeyRules)
    health: HealthRules = field(default_factory=HealthRules)
    dice: Dice = field(default=random.random)
    clock: Callable[[], float] = field(default=time.monotonic)


@dataclass(slots=True)
class _Heard:
    """What came of one try."""

    sent_at: float
    first_s: float | None = None  # until the first chunk
    tokens: int = 0
    used: int | None = None  # prompt and answer, as the provider counts them

    def note(self, chunk: Chunk) -> None:
        self.tokens += chunk.tokens
        if chunk.usage is not None:
            self.tokens = chunk.usage.completion_tokens
            self.used = chunk.usage.prompt_tokens + chunk.usage.completion_tokens


class Accounts(Provider):
    """*make* makes the provider of a route with one key."""

    def __init__(
        self,
        route: RouteSettings,
        make: Make,
        *,
        settings: WorkerSettings,
        headers: RateLimitHeaders,
        rules: Rules | None = None,
    ) -> None:
        """Raises: SetupError if the route can't work as it is written, or none of its keys can be read."""
        self._rules = rules or Rules()
        self._clock = self._rules.clock
        self._route = route.id
        self._settings = settings
        self._headers = headers
        self._accounts = open_accounts(route, make, on_open=lambda provider: provider.listen(self._hear))
        self._first = next(account.provider for account in self._accounts if account.provider is not None)
        self.name = self._first.name
        self._ring = KeyRing(
            [account.label for account in self._accounts],
            requests_per_minute=route.requests_per_minute,
            tokens_per_minute=route.tokens_per_minute,
            rules=self._rules.keys,
            dice=self._rules.dice,
        )
        self._by_key = {id(key): account for key, account in zip(self._ring.keys, self._accounts, strict=True)}
        for key, account in zip(self._ring.keys, self._accounts, strict=True):
            if account.provider is None:
                self._ring.kill(self._clock(), key, "can't be read")
        self._health = Health(self._rules.health, first_token_max_s=route.first_token_max_s, dice=self._rules.dice)
        self._expected = Expected()
        self._waiting = 0  # attempts, for room
        self._wanted = 1  # tokens of the job that was refused last: as long as they have no room, none comes
        self._promised: dict[Nonce, tuple[Grant, float]] = {}
        self._tell: Tell = lambda _: None
        self._hold: Hold = lambda _: None
        self._told: tuple[str | None, str | None] = (None, None)  # why it is down, why jobs are held
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._prober = Prober(
            self._ring,
            self._health,
            self._by_key,
            route=route,
            clock=self._clock,
            on_change=self._review,
            hear=_grant.set,
        )

    def upstream_model(self, model: str) -> str:
        return self._first.upstream_model(model)

    def continues(self, model: str) -> Continues:
        return self._first.continues(model)

    def fingerprint(self, model: str) -> ModelFingerprint | None:
        return self._first.fingerprint(model)

    def parameters(self) -> tuple[str, ...] | None:
        return self._first.parameters()

    def slots(self) -> int | None:
        return self._first.slots()

    def stats(self) -> EngineStats | None:
        return self._first.stats()

    def attach(self, tell: Tell) -> None:
        self._tell = tell
        self._review()

    def throttle(self, hold: Hold) -> None:
        self._hold = hold

    def standing(self) -> Standing:
        now = self._clock()
        rates = self._ring.rates(now)
        return Standing(
            keys=tuple(key.told(now) for key in self._ring.keys),
            rates=rates if rates.requests_per_minute or rates.tokens_per_minute else None,
            health=self._health.told(now),
        )

    async def models(self) -> tuple[str, ...]:
        """By the first key that may ask. Raises: Fault."""
        refused: Fault | None = None
        for key, account in zip(self._ring.keys, self._accounts, strict=True):
            if key.dead is None and account.provider is not None:
                try:
                    return await account.provider.models()
                except ProviderAuth as fault:
                    refused = fault
                    self._ring.kill(self._clock(), key, dead_reason(fault))
                    self._review()
        raise refused or ProviderAuth

    def admit(self, job: Job) -> bool:
        """Gives the job its key now if there is room, or very soon; `generate` uses that. Whoever waits already comes first."""
        if self._waiting:
            return False
        now, self._wanted = self._clock(), self._expected.tokens(job)
        found = self._ring.grant(now, self._wanted)
        if isinstance(found, Grant):
            self._wanted = 1
            self._forget_promises(now)
            self._promised[job.nonce] = (found, now)
            return True
        self._review()
        return not isinstance(found, Wait) or found.until - now <= HOLD_FROM_S

    async def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """Raises: the last try's fault; ProviderRateLimited if no key has room in time; ProviderAuth if none is left."""
        now = self._clock()
        timeouts = job.timeouts
        patience_s = min(timeouts.first_token_s, timeouts.total_s, self._settings.first_byte_timeout_s)
        tries = Tries(
            now,
            until=now + patience_s,
            keys=len(self._accounts),
            failures_max=self._settings.tries,
            dice=self._rules.dice,
        )
        promised = self._promised.pop(job.nonce, None)
        grant = promised[0] if promised else await self._wait_for_room(job, tries)
        while True:
            tries.count += 1
            heard = _Heard(self._clock())
            try:
                async with aclosing(self._asked(job, grant, tries)) as chunks:
                    async for chunk in chunks:
                        if heard.first_s is None:
                            heard.first_s = self._clock() - heard.sent_at
                        heard.note(chunk)
                        yield chunk if tries.count == 1 else msgspec.structs.replace(chunk, tries=tries.count)
            except Fault as fault:
                pause_s = self._failed(grant, fault, heard, tries)
                if pause_s is None:
                    raise
            else:
                self._served(job, grant, heard)
                return
            finally:
                self._ended(job, grant, heard)
            await asyncio.sleep(pause_s)
            grant = await self._wait_for_room(job, tries)

    async def aclose(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._prober.aclose()
        for account in self._accounts:
            await account.aclose()

    def _asked(self, job: Job, grant: Grant, tries: Tries) -> AsyncGenerator[Chunk, None]:
        provider = self._by_key[id(grant.key)].provider
        assert provider is not None  # noqa: S101 - a key that can't be read is dead
        _grant.set(grant)
        return provider.generate(_within(job, self._clock(), tries))

    async def _wait_for_room(self, job: Job, tries: Tries) -> Grant:
        """Raises: Fault."""
        self._waiting += 1
        try:
            return await self._room(job, tries)
        finally:
            self._waiting -= 1

    async def _room(self, job: Job, tries: Tries) -> Grant:
        """A grant for the next try, waited for as long as is worth it. Raises: Fault."""
        expected = self._expected.tokens(job)
        began = self._clock()
        give_up = min(tries.until, began + self._settings.limit_wait_s - tries.waited_s)
        while True:
            now = self._clock()
            if tries.last is not None and tries.until - now < REST_MIN_S:
                raise tries.last
            match self._ring.grant(now, expected):
                case Grant() as grant:
                    tries.waited_s += now - began
                    return grant
                case Wait(until=until):
                    self._review()
                    if until > give_up:
                        raise _limited(tries.last, until - now)
                    await asyncio.sleep(min(until - now, LOOK_EVERY_S))
                case None:
                    raise tries.last if isinstance(tries.last, ProviderAuth) else ProviderAuth()

    def _served(self, job: Job, grant: Grant, heard: _Heard) -> None:
        self._ring.served(self._clock(), grant.key)
        self._health.answered(self._clock(), first_token_s=heard.first_s if job.stream else None)
        self._expected.note(heard.tokens)
        self._prober.model = job.model

    def _failed(self, grant: Grant, fault: Fault, heard: _Heard, tries: Tries) -> float | None:
        """Notes what the fault says. Returns the pause before the next try; None if there is none."""
        now, key, found = self._clock(), grant.key, verdict(fault)
        if found is Verdict.KILL:
            if key.dead is None:
                self._ring.kill(now, key, dead_reason(fault))
                log.warning("provider_key_died", route=self._route, key=key.label, reason=key.dead)
        elif found is Verdict.COOL:
            self._cool(now, key, fault)
        elif is_unwell(
            fault, waited_s=now - heard.sent_at, patience_s=min(TIMEOUT_COUNTS_S, self._settings.first_byte_timeout_s)
        ):
            self._health.failed(now, f"the provider fails: {fault.message}")
        elif isinstance(fault, ProviderRejected):
            self._by_key[id(key)].hide_key(fault)
            self._health.answered(now)
        tries.last, fault.tries = fault, tries.count
        return None if heard.first_s is not None else tries.pause_s(found)

    def _cool(self, now: float, key: Key, fault: Fault) -> None:
        is_news = key.cools_until <= now
        self._ring.limit(now, key, fault.retry_after_s)
        left_s = round(key.cools_until - now, 2)
        if fault.retry_after_s is None:  # for the client, if this was the last try
            fault.retry_after_s = left_s
        if is_news:
            log.info("provider_key_limited", route=self._route, key=key.label, for_s=left_s)

    def _ended(self, job: Job, grant: Grant, heard: _Heard) -> None:
        used = heard.used
        if used is None and heard.tokens:
            used = prompt_tokens(job) + heard.tokens
        self._ring.ended(grant, used)
        self._review()

    def _hear(self, headers: Mapping[str, str]) -> None:
        """The head of an answer, in the task of the try that it belongs to."""
        grant = _grant.get()
        if grant is not None:
            now = datetime.now(UTC)
            requests = told_requests(headers, self._headers, now=now)
            tokens = told_tokens(headers, self._headers, now=now)
            self._ring.told(self._clock(), grant, requests=requests, tokens=tokens)

    def _review(self) -> None:
        """Tells the worker what has changed: whether the route is down, or its jobs are held; and looks again when it may change."""
        if self._closed:
            return
        self._prober.wake()
        now = self._clock()
        found = self._ring.look(now, self._wanted)
        wait_s = found.until - now if isinstance(found, Wait) else 0.0
        down = held = None
        if found is None:
            down = _all_dead([key.dead for key in self._ring.keys])
        elif self._health.down is not None:
            down = self._health.down
        elif isinstance(found, Wait) and wait_s > DOWN_FROM_S:
            down = f"{found.why} until {datetime.now(UTC) + timedelta(seconds=wait_s):%Y-%m-%d %H:%M} UTC"
        elif isinstance(found, Wait) and wait_s > HOLD_FROM_S:
            held = found.why
        self._say(down, held)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wait_s > 0:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._review)

    def _say(self, down: str | None, held: str | None) -> None:
        was_down, was_held = self._told
        self._told = (down, held)
        if held != was_held:
            self._hold(held)
        if down != was_down:
            self._tell(down)

    def _forget_promises(self, now: float) -> None:
        while self._promised:
            nonce, (grant, at) = next(iter(self._promised.items()))
            if now - at < PROMISE_S:
                return
            del self._promised[nonce]
            self._ring.ended(grant, None)


def _within(job: Job, now: float, tries: Tries) -> Job:
    """*job* with the time that is left of its time-outs."""
    gone_s = now - tries.began
    if gone_s < TRIFLE_S:
        return job
    left = msgspec.structs.replace(
        job.timeouts,
        first_token_s=round(max(0.0, tries.until - now), 2),
        total_s=round(max(0.0, job.timeouts.total_s - gone_s), 2),
    )
    return msgspec.structs.replace(job, timeouts=left)


def _limited(last: Fault | None, wait_s: float) -> Fault:
    """What it means that no key has room for so long: what the last try said, if that wasn't about keys."""
    if last is not None and not isinstance(last, ProviderAuth | ProviderRateLimited):
        return last
    fault = ProviderRateLimited(status=None if last is None else last.status, retry_after_s=wait_s)
    fault.tries = 0 if last is None else last.tries
    return fault


def _all_dead(reasons: list[str | None]) -> str:
    """Why a route without a living key is down; clients read it, so it names no key."""
    told = ", ".join(sorted({reason for reason in reasons if reason is not None}))
    return f"the provider's key is of no use: {told}" if len(reasons) == 1 else f"none of its keys is of use: {told}"
