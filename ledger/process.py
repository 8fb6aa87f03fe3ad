"""The ledger's process: the file, the writer and the HTTP endpoint, from start to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog
import uvicorn

from bus.connection import Connection, connect
from bus.log import EventLog
from bus.presence import Roll
from bus.processes import STOP_WAIT_S, end_after
from bus.publisher import Publisher
from bus.streams import await_streams
from ledger.opens import StoredOpens
from ledger.pen import PRODUCER, LogPen
from ledger.query import Queries
from ledger.reconciler import Reconciler
from ledger.server import build_app
from ledger.store import FILE, Store
from ledger.writer import Writer
from schemas import subjects
from schemas.errors import SetupError
from schemas.local import write_private
from schemas.settings import MIB, LedgerSettings, Settings

log = structlog.get_logger()

DATA_HEADROOM_BYTES = 1024 * MIB  # what the process may have beyond the queries' memory and results
HTTP_STOP_S = 1
KEEP_ALIVE_S = 30
BACKLOG = 512
FLUSH_WAIT_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a ledger runs. *fd* is a listening socket to serve on instead of binding one."""

    home: Path
    nats_url: str
    fd: int | None = None
    ready_file: Path | None = None


async def run_ledger(settings: Settings, place: Place) -> None:
    """Runs until SIGTERM or SIGINT, then stores what is still to be had and closes the file.

    Raises: PenstockError: what ends the process, such as a gap in a stream or a file that can't be written.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        end_after(STOP_WAIT_S)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    bound_memory(settings.ledger)
    store = Store.open(place.home / FILE, settings.ledger)
    queries = Queries(store.cursor, settings.ledger)
    try:
        connection = await connect(place.nats_url, name="ledger")
        try:
            await await_streams(connection, settings.nats)
            writer = Writer(
                connection, store, batch_pages=settings.ledger.batch_pages, free_memory=queries.interrupt_all
            )
            await writer.start()
            with listening(settings.ledger, place.fd) as sock:
                server = _Server(
                    uvicorn.Config(
                        build_app(writer, queries),
                        log_config=None,
                        access_log=False,
                        lifespan="off",
                        backlog=BACKLOG,
                        timeout_keep_alive=KEEP_ALIVE_S,
                        timeout_graceful_shutdown=HTTP_STOP_S,
                    )
                )
                work = reconciling(connection, store, writer, settings.ledger)
                await _serve(server, sock, work, writer=writer, queries=queries, stop=stop, place=place)
        finally:
            await connection.close()
    finally:
        store.close()
    log.info("ledger_stopped")
    if queries.running:  # one that can't be interrupted: the interpreter would wait for its thread
        sys.stderr.flush()
        os._exit(0)


@contextlib.asynccontextmanager
async def reconciling(
    connection: Connection, store: Store, writer: Writer, settings: LedgerSettings
) -> AsyncIterator[None]:
    """Meanwhile what dead ingresses left open is closed. Raises: ApiError, BusUnavailable."""
    publisher = Publisher(connection)
    await publisher.start()
    event_log = EventLog(connection, publisher, producer=PRODUCER)
    roll = Roll(connection)
    await roll.start()
    opens = StoredOpens(store.cursor, lambda: writer.cursors[subjects.EVENTS].last_seq)
    reconciler = Reconciler(
        opens,
        LogPen(event_log, publisher),
        roll.silent_s,
        silence_s=settings.ingress_silence_s,
        receipt_wait_s=settings.receipt_wait_s,
    )
    reviewing = asyncio.create_task(reconciler.run(), name="reconciler")
    try:
        yield
    finally:
        reviewing.cancel()
        await asyncio.gather(reviewing, return_exceptions=True)
        opens.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_WAIT_S):
                await event_log.flush()
        await roll.stop()
        await publisher.stop()


async def _serve(
    server: uvicorn.Server,
    sock: socket.socket,
    work: contextlib.AbstractAsyncContextManager[None],
    *,
    writer: Writer,
    queries: Queries,
    stop: asyncio.Event,
    place: Place,
) -> None:
    """Serves, stores and does *work* until *stop*."""
    storing = asyncio.create_task(writer.run(), name="writer")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    knowing = asyncio.create_task(writer.keys_known(), name="keys")
    await asyncio.wait([storing, stopping, knowing], return_when=asyncio.FIRST_COMPLETED)
    serving = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    url = url_of(sock)
    log.info("ledger_started", url=url, **{name.lower(): c.last_position for name, c in writer.cursors.items()})
    if place.ready_file is not None and knowing.done():
        write_private(place.ready_file, msgspec.json.encode({"url": url, "pid": os.getpid()}) + b"\n")
    try:
        async with work:
            await asyncio.wait([storing, serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        writer.stop()
        await storing
    finally:
        server.should_exit = True  # who comes now waits for the next ledger, or is refused
        await queries.close()
        await serving
        stopping.cancel()
        knowing.cancel()


class _Server(uvicorn.Server):
    """Leaves the signals to `run_ledger`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def listening(settings: LedgerSettings, fd: int | None) -> Iterator[socket.socket]:
    """A listening socket: the inherited *fd*, or a new one.

    Raises: SetupError if the port can't be had, or *fd* is no socket.
    """
    try:
        sock = socket.socket(fileno=fd) if fd is not None else _bind(settings)
    except OSError as error:
        wanted = f"fd {fd}" if fd is not None else f"{settings.host}:{settings.port}"
        raise SetupError(f"the ledger can't listen on {wanted}: {error.strerror}") from error
    with sock:
        yield sock


def _bind(settings: LedgerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bound_memory(settings: LedgerSettings) -> None:
    """Bounds the process's memory (Linux): some SQL functions allocate gigabytes that the database's own limit doesn't count.

    An allocation beyond it fails within the query that asks for it, as being out of memory.
    """
    if sys.platform != "linux":
        return
    results = 2 * settings.sql_max_concurrent * settings.sql_max_result_bytes
    limit = settings.sql_memory_mib * MIB + results + DATA_HEADROOM_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
