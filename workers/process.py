"""A worker as a process: what it is made of, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import msgspec
import structlog

from bus.connection import Connection, connect
from bus.log import EventLog
from bus.publisher import Publisher
from schemas.errors import Fault, SetupError
from schemas.ids import WorkerId
from schemas.local import write_private
from schemas.settings import ModelSettings, RouteSettings, Settings
from workers.providers import make_provider
from workers.worker import Route, Worker

log = structlog.get_logger()

MODELS_MAX = 10_000


async def run_worker(
    settings: Settings,
    routes: tuple[RouteSettings, ...],
    *,
    nats_url: str,
    name: WorkerId,
    ready_file: Path | None,
    version: str,
) -> None:
    """Serves *routes* until SIGTERM or SIGINT; then drains. A second signal ends it at once.

    Raises: SetupError.
    """
    connection = await connect(nats_url, name=name)
    publisher = Publisher(connection)
    await publisher.start()
    worker = Worker(
        connection,
        EventLog(connection, publisher, producer=name),
        [await _open(route, settings) for route in routes],
        worker=name,
        settings=settings.worker,
        nats_settings=settings.nats,
        version=version,
    )
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    await worker.start()
    log.info("serving", worker=name, routes=[route.id for route in routes])
    if ready_file is not None:
        write_private(ready_file, msgspec.json.encode({"worker": name, "pid": os.getpid()}))
    await stop.wait()
    await worker.drain()
    await _close(publisher, connection)
    log.info("stopped")


async def _open(settings: RouteSettings, all_settings: Settings) -> Route:
    provider = make_provider(settings, all_settings.worker)
    models = settings.models
    if not models:
        try:
            names = await provider.models()
        except Fault as fault:
            raise SetupError(
                f"route {settings.id!r} names no models, and asking for them failed: {fault.message}"
            ) from fault
        models = tuple(ModelSettings(name=name) for name in names[:MODELS_MAX])
    return Route(settings, provider, models)


async def _close(publisher: Publisher, connection: Connection) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await publisher.stop()
    await connection.close()
