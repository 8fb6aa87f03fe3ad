"""The ingress as a process: what it is made of, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog
import uvicorn
from starlette.types import ASGIApp

from bus.claims import Claims
from bus.connection import Connection, connect
from bus.control import ControlFeed
from bus.log import FENCED, EventLog
from bus.presence import Beacon
from bus.processes import end_after
from bus.publisher import Publisher
from bus.queue import JobQueue
from bus.streams import await_streams, ensure_streams
from ingress.app import build_app
from ingress.books import LAST_WORD_WAIT_S, RECORD_FAILURE_WAIT_S
from ingress.bootstrap import Setup, state_setup
from ingress.exchange import Services
from ingress.fleet import Fleet
from ingress.hedging import Hedges
from ingress.neighbours import Neighbours
from ingress.overdue import Overdue
from ingress.protocol import bounded_protocol
from ingress.pulse import Pulse
from ingress.receipts import Receipts
from ingress.relay import Switchboard
from ingress.router import Router
from schemas import subjects
from schemas.errors import LogUnavailable, SetupError
from schemas.ids import IngressId
from schemas.local import write_private
from schemas.settings import IngressSettings, Settings
from schemas.tuning import settle_collector

log = structlog.get_logger()

KEEP_ALIVE_S = 75  # longer than clients keep a connection in their pools
LAST_WORDS_S = LAST_WORD_WAIT_S + RECORD_FAILURE_WAIT_S  # behind the drain, for answers that wait for the log
FLUSH_WAIT_S = 5.0  # and behind that, for events that do
BACKLOG = 2048
SPARE_FILES = 256  # besides the connections of clients


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the process stops in its own order."""

    told_at: float | None = None  # when it was told to stop, by the loop's clock

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run_ingress(
    settings: Settings, *, nats_url: str, name: IngressId, setup: Setup, fd: int | None, ready_file: Path | None
) -> None:
    """Serves until SIGTERM or SIGINT; then finishes what runs, within ``ingress.drain_s``.

    *fd* is a listening socket that somebody else keeps open for us; without it we bind one.
    Raises: SetupError; LogUnavailable if it was taken for dead and its requests were closed.
    """
    _raise_open_files(settings.ingress.max_connections + SPARE_FILES)
    sock = _listening_socket(settings.ingress.host, settings.ingress.port, fd)
    connection = await connect(nats_url, name=name)
    await await_streams(connection, settings.nats)
    connection.on_reconnect(lambda: ensure_streams(connection, settings.nats))  # JOBS lives in memory
    publisher = Publisher(connection)
    await publisher.start()
    fenced = asyncio.Event()
    event_log = EventLog(connection, publisher, producer=name, fence=subjects.fence(name), on_fenced=fenced.set)
    refusals = EventLog(connection, publisher, producer=f"{name}-refusals")
    beacon = Beacon(connection, name, on_lapse=event_log.look_for_fence)
    control = ControlFeed(connection, publisher)
    await control.start()
    await state_setup(control, setup, producer=name)
    switchboard = Switchboard(connection, ingress=name, max_bytes_per_relay=settings.ingress.max_buffered_bytes)
    await switchboard.start()
    fleet, pulse = await _watch(connection, switchboard)
    overdue = Overdue(fleet)
    overdue.start()
    await beacon.start()
    neighbours = Neighbours(connection, name)
    await neighbours.start()
    router = Router(fleet, control, settings.routing)
    services = Services(
        ingress=name,
        log=event_log,
        refusals=refusals,
        queue=JobQueue(connection, publisher),
        switchboard=switchboard,
        router=router,
        timeouts=settings.ingress.timeouts,
        keep_alive_comment_s=settings.ingress.keep_alive_comment_s,
        claims=Claims(connection, publisher),
        neighbours=neighbours,
        hedges=Hedges(router, after_s=settings.ingress.hedge_after_s) if settings.ingress.hedge else None,
        receipts=Receipts(connection),
        overdue=overdue,
    )
    app = build_app(connection, services, control=control, fleet=fleet, settings=settings.ingress)
    server = _http_server(app, settings.ingress)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, _stop, server, settings.ingress)
    port = sock.getsockname()[1]
    log.info("listening", host=settings.ingress.host, port=port)
    settle_collector()
    if ready_file is not None:
        write_private(ready_file, msgspec.json.encode({"port": port, "pid": os.getpid()}))
    ending = asyncio.create_task(_end_when_fenced(fenced, server), name="fence")
    await server.serve(sockets=[sock])
    await _last_words(server)
    ending.cancel()
    await _flush((event_log, refusals), server, drain_s=settings.ingress.drain_s)
    await beacon.stop()
    await overdue.stop()
    await pulse.stop()
    await fleet.stop()
    await control.stop()
    await publisher.stop()
    await connection.close()
    if event_log.fenced:
        raise LogUnavailable(FENCED)
    log.info("stopped")


def _http_server(app: ASGIApp, settings: IngressSettings) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=bounded_protocol(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing here depends on who the client says it is
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(settings.drain_s),
        )
    )


async def _end_when_fenced(fenced: asyncio.Event, server: uvicorn.Server) -> None:
    """What runs here is closed in the books, and no success may be told any more: it ends now, and a new process begins anew."""
    await fenced.wait()
    server.should_exit = True
    for task in list(server.server_state.tasks):
        task.cancel()


async def _watch(connection: Connection, switchboard: Switchboard) -> tuple[Fleet, Pulse]:
    """Who is there, and who has just gone."""
    fleet = Fleet(connection)
    fleet.on_lost(switchboard.lose)
    fleet.on_changed(switchboard.rouse_waiting)
    await fleet.start()
    await fleet.gather()
    pulse = Pulse(connection, switchboard, listens=fleet.listens, gone=fleet.gone)
    await pulse.start()
    return fleet, pulse


async def _last_words(server: uvicorn.Server) -> None:
    """What the end of the drain cut off still tells its client so, and closes its books; uvicorn doesn't wait for that."""
    if server.server_state.tasks:
        await asyncio.wait(server.server_state.tasks, timeout=LAST_WORDS_S)


async def _flush(logs: tuple[EventLog, ...], server: _Server, *, drain_s: float) -> None:
    """Waits for what is not on record yet. While the log is away that may take as long as a stop may take at all.

    What a drain didn't need of its time is left for that: nobody else knows these events.
    """
    now = asyncio.get_running_loop().time()
    until = now if server.told_at is None else max(now, server.told_at + drain_s + LAST_WORDS_S)
    try:
        async with asyncio.timeout_at(until + FLUSH_WAIT_S):
            await asyncio.gather(*(each.flush() for each in logs))
    except TimeoutError:
        log.error("events_not_recorded_in_time", waiting=sum(each.waiting for each in logs))


def _raise_open_files(wanted: int) -> None:
    """Each connection is an open file, and the usual limit is 1024, though a process may raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("open_files_limited", allowed=allowed, wanted=wanted)


def _stop(server: _Server, settings: IngressSettings) -> None:
    log.info("stopping")
    if server.told_at is None:
        server.told_at = asyncio.get_running_loop().time()
    end_after(settings.stop_wait_s)
    server.should_exit = True


def _listening_socket(host: str, port: int, fd: int | None) -> socket.socket:
    if fd is not None:
        return socket.socket(fileno=fd)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise SetupError(
            f"{host}:{port} can't be listened on: {error.strerror}. Choose another with --port."
        ) from error
    return sock
