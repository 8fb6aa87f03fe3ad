"""The ledger's process as an operator runs it: killed at any moment, stopped, misled, and asked for too much."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import duckdb
import msgspec
import pytest

from bus.connection import Connection
from bus.log import EventLog
from bus.publisher import Publisher
from bus.server import EmbeddedServer, die_with_parent
from ledger.client import Ledger, ask, table_of
from ledger.store import FILE
from schemas import codec
from schemas.control import Role
from schemas.errors import SetupError
from schemas.ids import EventId, RequestId, new_id
from tests.integration.ledger.conftest import ANALYST_KEY, sha256
from tests.unit.ledger import samples
from tests.waiting import eventually

ROOT = Path(__file__).parents[3]
KILLS = 12


class LedgerProcess:
    """`penstock ledger` as an operator runs it."""

    def __init__(self, nats_url: str, home: Path) -> None:
        self._home = home
        self._ready_file = home / "ledger-ready.json"
        self._environ = {**os.environ, "PENSTOCK_NATS": nats_url, "PENSTOCK_LEDGER_SQL_TIMEOUT_S": "20"}
        self.log = home / "ledger.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._home.mkdir(parents=True, exist_ok=True)
        self._ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "ledger", "--home", self._home, "--ready-file", self._ready_file],
                cwd=ROOT,
                env=self._environ,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call
            )

    async def ready(self) -> Ledger:
        def url() -> str:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            told = msgspec.json.decode(self._ready_file.read_bytes())
            assert told["pid"] == self.process.pid
            return str(told["url"])

        return Ledger(await eventually(url, timeout_s=20, what="the ledger is ready"), ANALYST_KEY)

    async def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 30)


async def give_key(publisher: Publisher) -> None:
    key = samples.key_stated(sha256(ANALYST_KEY), key_id="key_analyst", role=Role.ANALYST)
    await publisher.publish("control.key.key_analyst", codec.encode(key), timeout_s=5)


def queries_of(ledger: Ledger) -> int:
    with urllib.request.urlopen(f"{ledger.url}/readyz", timeout=5) as response:
        return int(msgspec.json.decode(response.read())["queries"])


async def publish_until(stop: asyncio.Event, event_log: EventLog) -> set[str]:
    """Requests as an ingress tells of them, a few at a time; returns the ids of their events."""
    ids: set[str] = set()
    number = 0
    while not stop.is_set():
        futures = []
        for _ in range(random.randrange(1, 30)):
            number += 1
            request = RequestId(new_id())
            for event in samples.whole(number):
                new = msgspec.structs.replace(event, id=EventId(new_id()), request_id=request, ts_ns=time.time_ns())
                ids.add(new.id)
                futures.append(event_log.append(new))
        await asyncio.gather(*futures)
        await asyncio.sleep(random.random() * 0.01)
    return ids


@pytest.mark.timeout(180)
async def test_every_event_is_stored_once_whenever_the_ledger_is_killed(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    """Killed while it starts, reads, commits or checkpoints; an ingress goes on publishing all the while."""
    random.seed(7)
    await give_key(publisher)
    stop = asyncio.Event()
    publishing = asyncio.create_task(publish_until(stop, EventLog(connection, publisher, producer="ingress-1")))
    process = LedgerProcess(nats_server.url, home)
    for _ in range(KILLS):
        process.start()
        await asyncio.sleep(0.3 + random.random() * 1.2)
        assert await process.end(signal.SIGKILL) == -signal.SIGKILL
    stop.set()
    published = await publishing
    process.start()
    ledger = await process.ready()

    def all_stored() -> bool:
        sql = "select count(*) from events where log = 'EVENTS'"
        return bool(table_of(ask(ledger, sql)).rows[0][0] >= len(published))

    await eventually(lambda: asyncio.to_thread(all_stored), timeout_s=60, what="everything is stored", every_s=0.1)
    assert await process.end(signal.SIGTERM) == 0
    with duckdb.connect(str(home / FILE)) as database:
        sql = "select count(*), count(distinct id), min(position), max(position) from events where log = 'EVENTS'"
        total = len(published)
        assert database.execute(sql).fetchall() == [(total, total, 1, total)]
        assert {
            str(id_) for (id_,) in database.execute("select id from events where log = 'EVENTS'").fetchall()
        } == published
        assert database.execute(
            "select count(*), count(distinct request_id), min(status) from requests"
        ).fetchall() == [(total // 4, total // 4, "completed")]
        assert database.execute("select count(*) from attempts where outcome = 'completed'").fetchall() == [
            (total // 4,)
        ]


async def test_sigterm_stores_what_was_said_before_and_ends_in_peace(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    process = LedgerProcess(nats_server.url, home)
    process.start()
    await process.ready()
    for number in range(1, 101):
        await publisher.publish("events.test", samples.page(*samples.whole(number)), timeout_s=5)
    assert await process.end(signal.SIGTERM) == 0
    with duckdb.connect(str(home / FILE)) as database:
        assert database.execute("select count(*) from events").fetchall() == [(400,)]
    assert not (home / FILE).with_suffix(".duckdb.wal").exists()
    levels = {msgspec.json.decode(line)["level"] for line in process.log.read_bytes().splitlines()}
    assert levels <= {"debug", "info"}


@pytest.mark.skipif(sys.platform != "linux", reason="the bound on a process's memory is Linux's")
async def test_a_query_that_asks_for_gigabytes_fails_alone(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    """Some functions allocate what the database's own limit doesn't count; the process has a limit, too."""
    await give_key(publisher)
    process = LedgerProcess(nats_server.url, home)
    process.start()
    ledger = await process.ready()
    for value in ("repeat('x', 3000000000)", "range(500000000)"):
        with pytest.raises(SetupError, match="memory"):
            await asyncio.to_thread(ask, ledger, f"select length({value})")
    await publisher.publish("events.test", samples.page(*samples.whole()), timeout_s=5)

    def count() -> int:
        return int(table_of(ask(ledger, "select count(*) from requests")).rows[0][0])

    await eventually(lambda: asyncio.to_thread(lambda: count() == 1), what="it still stores and answers")
    assert await process.end(signal.SIGTERM) == 0


async def test_a_query_that_cannot_be_interrupted_does_not_hold_the_end_up(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    await give_key(publisher)
    process = LedgerProcess(nats_server.url, home)
    process.start()
    ledger = await process.ready()
    await publisher.publish("events.test", samples.page(*samples.whole()), timeout_s=5)
    asking = asyncio.create_task(asyncio.to_thread(ask, ledger, "select length(lpad('x', 2000000000, 'y'))"))
    await eventually(lambda: asyncio.to_thread(queries_of, ledger), what="the query runs")
    assert await process.end(signal.SIGTERM) == 0
    await asyncio.gather(asking, return_exceptions=True)
    with duckdb.connect(str(home / FILE)) as database:
        assert database.execute("select count(*) from events where log = 'EVENTS'").fetchall() == [(4,)]


async def test_a_gap_ends_the_process_with_a_line_that_says_why(
    nats_server: EmbeddedServer, connection: Connection, publisher: Publisher, home: Path
) -> None:
    process = LedgerProcess(nats_server.url, home)
    process.start()
    await process.ready()
    await publisher.publish("events.test", samples.page(*samples.whole()), timeout_s=5)
    assert await process.end(signal.SIGTERM) == 0
    await connection.api("STREAM.DELETE.EVENTS")
    process.start()
    assert process.process is not None
    assert await asyncio.to_thread(process.process.wait, 20) == 1
    assert "the stream EVENTS is not the one that this ledger has read to message 1" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()


async def test_a_second_ledger_on_the_same_file_says_who_has_it(
    nats_server: EmbeddedServer, connection: Connection, home: Path
) -> None:
    first = LedgerProcess(nats_server.url, home)
    first.start()
    await first.ready()
    assert first.process is not None
    second = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "penstock", "ledger", "--home", home, "--nats", nats_server.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode == 1
    assert "if another ledger runs on it" in second.stderr
    assert str(first.process.pid) in second.stderr
    assert "Traceback" not in second.stderr
    await first.end(signal.SIGTERM)
