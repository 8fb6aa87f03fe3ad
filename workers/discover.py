"""Which OpenAI-compatible servers run on this machine: looks for them, serves them while they are there.

Each address has a watcher of its own. Nobody there costs a refused connection every few seconds; who is there and is none of
the kinds that are known is asked again now and then, and left alone otherwise.
Sources: docs/adr/0040-local-servers.md, docs/local-servers.md
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import structlog

from schemas.errors import Fault, ProviderUnreachable
from schemas.ids import RouteId
from schemas.settings import RouteSettings, WorkerSettings
from workers.local.asker import Asker
from workers.local.found import Found, Pace
from workers.local.kinds import Kind, Stranger, recognise
from workers.local.provider import LocalServer
from workers.worker import Worker

log = structlog.get_logger()

CHECKS_AT_ONCE = 2
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


class Discovery:
    """Finds servers for *worker* besides its configured *routes*, whose names and addresses are theirs."""

    def __init__(
        self, worker: Worker, routes: tuple[RouteSettings, ...], settings: WorkerSettings, *, pace: Pace | None = None
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._pace = pace or Pace()
        self._taken: set[RouteId] = {route.id for route in routes}
        configured = {address for route in routes if (address := _address_of(route.base_url))}
        self._looked = {a: asyncio.Event() for a in settings.discover_addresses if a not in configured}
        self._checks = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._watchers: list[asyncio.Task[None]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._providers: set[LocalServer] = set()
        self._strangers: dict[str, str | None] = {}

    def start(self) -> None:
        for address in self._looked:
            self._watchers.append(asyncio.create_task(self._watch(address), name=f"local-{address}"))

    async def looked(self) -> None:
        """Returns when each address was looked at, and what is there was checked, once."""
        for event in self._looked.values():
            await event.wait()

    async def stop(self) -> None:
        """Looks no more. What was found is served on."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    async def aclose(self) -> None:
        """Closes the connections, after the worker has drained."""
        await self.stop()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for provider in list(self._providers):
            await provider.aclose()

    async def _watch(self, address: str) -> None:
        asker = Asker(address, self._settings, answer_wait_s=self._pace.answer_wait_s)
        try:
            while True:
                try:
                    wait_s = await self._look(asker)
                except Exception:
                    log.exception("local_watch_broke", address=address)
                    wait_s = self._pace.stranger_every_s
                self._looked[address].set()
                await asyncio.sleep(wait_s)
        finally:
            await asker.aclose()

    async def _look(self, asker: Asker) -> float:
        """Serves who is there until they are gone. Returns the seconds until the next look."""
        try:
            kind = await recognise(asker)
        except ProviderUnreachable:
            self._strangers.pop(asker.address, None)
            return self._pace.poll_every_s
        except Stranger as stranger:
            self._tell_stranger(asker.address, stranger.why)
            return self._pace.stranger_every_s
        except Fault as fault:  # no HTTP, or no answer in time
            log.debug("local_server_not_told", address=asker.address, error=fault.message)
            return self._pace.stranger_every_s
        await self._serve(kind, asker)
        return self._pace.poll_every_s

    async def _serve(self, kind: Kind, asker: Asker) -> None:
        route_id = self._name(kind, asker.address)
        found = Found(
            kind,
            asker,
            worker=self._worker,
            settings=self._settings,
            route_id=route_id,
            checks=self._checks,
            pace=self._pace,
            on_checked=self._looked[asker.address].set,
        )
        self._taken.add(route_id)
        self._providers.add(found.provider)
        try:
            await found.serve()
        finally:
            self._taken.discard(route_id)
        task = asyncio.create_task(self._close_when_idle(found))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_when_idle(self, found: Found) -> None:
        await found.route.idle.wait()
        self._providers.discard(found.provider)
        await found.provider.aclose()

    def _name(self, kind: Kind, address: str) -> RouteId:
        plain = RouteId(kind.name)
        return plain if plain not in self._taken else RouteId(f"{kind.name}-{address.rpartition(':')[2]}")

    def _tell_stranger(self, address: str, why: str | None) -> None:
        if self._strangers.get(address, "") != why:
            self._strangers[address] = why
            level = log.debug if why is None else log.info
            level("local_server_not_known", address=address, reason=why)


def _address_of(base_url: str | None) -> str | None:
    """A configured route's ``host:port`` on this machine, as discovery would write it."""
    try:
        url = urlsplit(base_url or "")
        port = url.port
    except ValueError:
        return None
    return f"127.0.0.1:{port}" if url.hostname in LOOPBACK_NAMES and port else None
