"""A ledger's file, and a whole ledger on a real NATS."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from bus.connection import Connection, connect
from bus.publisher import Publisher
from bus.reader import StoredMessage
from bus.server import EmbeddedServer
from ledger.process import listening, url_of
from ledger.query import Queries
from ledger.server import build_app
from ledger.store import FILE, Store
from ledger.writer import Writer
from schemas import subjects
from schemas.codec import encode
from schemas.control import AnyControlEvent, Role
from schemas.events import Event
from schemas.settings import LedgerSettings
from tests.unit.ledger import samples
from tests.waiting import eventually

ANALYST_KEY = "sk-analyst"
CLIENT_KEY = "sk-client"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def open_store(home: Path) -> Iterator[Callable[..., Store]]:
    """Opens the ledger's file; closes what the test leaves open."""
    with contextlib.ExitStack() as stack:

        def open_(**settings: Any) -> Store:
            store = Store.open(home / FILE, LedgerSettings(**settings))
            stack.callback(store.close)
            return store

        yield open_


@dataclass
class Log:
    """A stream as a test writes it: pages of events, numbered."""

    store: Store
    name: str = subjects.EVENTS
    seq: int = 0

    def write(self, *pages: Sequence[Event | AnyControlEvent | bytes]) -> None:
        """Stores *pages* in one commit."""
        messages = []
        for events in pages:
            self.seq += 1
            messages.append(StoredMessage(f"{self.name.lower()}.p", self.seq, samples.page(*events)))
        self.store.append(messages, self.store.read_cursor(self.name))


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger's file of which nothing is known but its tables: to make it takes a tenth of a second of a processor."""
    path = tmp_path_factory.mktemp("ledger") / FILE
    Store.open(path, LedgerSettings()).close()
    return path


def lay(file: Path, home: Path) -> None:
    """A copy of *file* becomes that of *home*."""
    (home / FILE).parent.mkdir(parents=True)
    shutil.copy(file, home / FILE)


@pytest.fixture
def store(home: Path, empty_file: Path, open_store: Callable[..., Store]) -> Store:
    lay(empty_file, home)
    return open_store()


@pytest.fixture
def log(store: Store) -> Log:
    return Log(store)


def rows(store: Store, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    with store.cursor() as cursor:
        return cursor.execute(sql, list(params)).fetchall()


def records(store: Store, sql: str) -> list[dict[str, Any]]:
    with store.cursor() as cursor:
        found = cursor.execute(sql).fetchall()
        names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found]


@dataclass
class RunningLedger:
    """A ledger in this process: its writer, its file and its HTTP."""

    url: str
    store: Store
    writer: Writer
    queries: Queries
    publisher: Publisher
    failed: asyncio.Task[None]
    said: int = field(default=0)

    async def say(self, *events: Event | bytes) -> None:
        """Publishes a page and returns when it is stored."""
        self.said = await self.publisher.publish("events.test", samples.page(*events), timeout_s=5)
        await eventually(lambda: self.writer.cursors[subjects.EVENTS].last_seq >= self.said, what="the page is stored")

    async def state(self, *events: AnyControlEvent) -> None:
        for event in events:
            entity = event.__struct_config__.tag.split(".")[1]
            seq = await self.publisher.publish(f"control.{entity}.{event.id}", encode(event), timeout_s=5)
            await eventually(lambda seq=seq: self.writer.cursors[subjects.CONTROL].last_seq >= seq, what="it is folded")


@contextlib.asynccontextmanager
async def ledger_up(
    nats: EmbeddedServer, home: Path, publisher: Publisher, **settings: Any
) -> AsyncIterator[RunningLedger]:
    configured = LedgerSettings(**settings)
    store = Store.open(home / FILE, configured)
    connection: Connection = await connect(nats.url, name="ledger")
    queries = Queries(store.cursor, configured)
    writer = Writer(connection, store, batch_pages=configured.batch_pages, free_memory=queries.interrupt_all)
    try:
        await writer.start()
        storing = asyncio.create_task(writer.run())
        with listening(configured, None) as sock:
            async with _served(writer, queries, sock):
                yield RunningLedger(url_of(sock), store, writer, queries, publisher, storing)
                writer.stop()
        await asyncio.wait([storing])
        if not storing.cancelled():
            storing.exception()
    finally:
        await queries.close()
        await connection.close()
        store.close()


@contextlib.asynccontextmanager
async def _served(writer: Writer, queries: Queries, sock: socket.socket) -> AsyncIterator[None]:
    server = uvicorn.Server(
        uvicorn.Config(build_app(writer, queries), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    await eventually(lambda: server.started)
    yield
    server.should_exit = True
    await task


@pytest.fixture
def sql_timeout_s() -> float:
    """Long enough for any query on a busy machine; a test that waits for it has it shorter."""
    return 10.0


@pytest.fixture
async def ledger(  # noqa: PLR0917
    nats_server: EmbeddedServer,
    connection: Connection,
    publisher: Publisher,
    home: Path,
    empty_file: Path,
    sql_timeout_s: float,
) -> AsyncIterator[RunningLedger]:
    """A ledger that knows two keys."""
    lay(empty_file, home)
    async with ledger_up(
        nats_server, home, publisher, sql_timeout_s=sql_timeout_s, sql_max_rows=100, sql_max_concurrent=2
    ) as running:
        await running.state(
            samples.key_stated(sha256(ANALYST_KEY), key_id="key_analyst", role=Role.ANALYST),
            samples.key_stated(sha256(CLIENT_KEY), key_id="key_client", role=Role.CLIENT),
        )
        yield running


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
