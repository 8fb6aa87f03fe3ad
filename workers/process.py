"""A worker as a process: what it is made of, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from bus.connection import Connection, connect
from bus.log import EventLog
from bus.processes import end_after
from bus.publisher import Publisher
from schemas.errors import PenstockError
from schemas.ids import WorkerId
from schemas.local import write_private
from schemas.routes import priced
from schemas.settings import ModelSettings, RouteSettings, Settings
from schemas.tuning import settle_collector
from workers.discover import Discovery
from workers.providers import make_provider
from workers.providers.base import Provider
from workers.route import Route
from workers.worker import Worker

log = structlog.get_logger()

MODELS_MAX = 10_000
ASK_AGAIN_S = 30.0
FIRST_ANSWER_WAIT_S = 2.0  # a worker is ready without the routes whose providers take longer


async def run_worker(
    settings: Settings,
    routes: tuple[RouteSettings, ...],
    *,
    nats_url: str,
    name: WorkerId,
    ready_file: Path | None,
    version: str,
    discover: bool = False,
) -> None:
    """Serves *routes*, and with *discover* the model servers of this machine, until SIGTERM or SIGINT; then drains.

    A second signal ends it at once.

    Raises: SetupError; ApiError, BusUnavailable if NATS gives it no jobs.
    """
    opened = {route.id: make_provider(route, settings.worker) for route in routes}
    try:
        connection = await connect(nats_url, name=name)
    except PenstockError:
        await asyncio.gather(*(provider.aclose() for provider in opened.values()))
        raise
    publisher = Publisher(connection)
    await publisher.start()
    named = [route for route in routes if route.models]
    worker = Worker(
        connection,
        EventLog(connection, publisher, producer=name),
        [Route(route, opened[route.id], route.models) for route in named],
        worker=name,
        settings=settings.worker,
        nats_settings=settings.nats,
        version=version,
    )
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        end_after(settings.worker.stop_wait_s)
        (stop_now if stop.is_set() else stop).set()

    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, on_signal)
    try:
        await worker.start()
    except PenstockError:
        await _close(opened.values(), publisher, connection)
        raise
    unnamed = [route for route in routes if not route.models]
    asked = [asyncio.Event() for _ in unnamed]
    askers = [
        asyncio.create_task(
            _serve_when_named(worker, route, opened[route.id], asked=event), name=f"models-of-{route.id}"
        )
        for route, event in zip(unnamed, asked, strict=True)
    ]
    discovery = Discovery(worker, routes, settings.worker)
    if discover:
        discovery.start()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_ANSWER_WAIT_S):
            for event in asked:
                await event.wait()
            if discover:
                await discovery.looked()
    log.info("serving", worker=name, routes=worker.routes())
    settle_collector()
    if ready_file is not None:
        write_private(ready_file, msgspec.json.encode({"worker": name, "pid": os.getpid()}))
    await stop.wait()
    for asker in askers:
        asker.cancel()
    await discovery.stop()
    await _unless(stop_now, worker.drain())
    await discovery.aclose()
    await _close(opened.values(), publisher, connection)
    log.info("stopped")


async def _close(providers: Iterable[Provider], publisher: Publisher, connection: Connection) -> None:
    for provider in providers:
        await provider.aclose()
    await publisher.stop()
    await connection.close()


async def _serve_when_named(worker: Worker, route: RouteSettings, provider: Provider, *, asked: asyncio.Event) -> None:
    """For a route whose models are not configured: asks its provider for them, until it answers, then serves them.

    A provider that can't be reached must not keep the others from being served. *asked* is set after the first try.
    """
    while True:
        try:
            names = await provider.models()
            models = tuple(priced(route, ModelSettings(name=name)) for name in names[:MODELS_MAX])
            await worker.add(Route(route, provider, models))
        except PenstockError as error:  # the provider can't be asked, or NATS is away at this very moment
            log.warning("route_not_served", route=route.id, error=error.message, again_in_s=ASK_AGAIN_S)
        else:
            return
        finally:
            asked.set()
        await asyncio.sleep(ASK_AGAIN_S)


async def _unless(stop_now: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Does *work*, or drops it when *stop_now* is set."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop_now.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        working.result()
    else:
        log.warning("drain_cut_off")
        working.cancel()
    await asyncio.gather(working, stopping, return_exceptions=True)
