"""The ledger's file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import msgspec
import pytest

from bus.reader import StoredMessage
from ledger.migrations import Migration, migrate, released
from ledger.rows import TABLES
from ledger.store import FILE, Store, StoreFailed
from schemas import subjects
from schemas.codec import encode
from schemas.errors import SetupError
from schemas.money import UNKNOWN
from schemas.settings import LedgerSettings
from tests.integration.ledger.conftest import Log, rows
from tests.unit.ledger import samples


def test_what_was_stored_is_there_after_a_restart(open_store: Callable[..., Store]) -> None:
    first = open_store()
    Log(first).write(samples.whole(), [samples.accepted(2)])
    first.close()
    again = open_store()
    assert rows(again, "select count(*) from events") == [(5,)]
    assert again.read_cursor(subjects.EVENTS)[:3] == (subjects.EVENTS, 2, 5)


def test_events_are_kept_byte_for_byte(store: Store, log: Log) -> None:
    odd = msgspec.json.format(encode(samples.finished(2)), indent=1).replace(b"\n", b" ")
    lines = [*map(encode, samples.whole()), odd, b'{"kind":"from.tomorrow","v":1,"x":"\\u0000\\ud83d\\ude00"}']
    log.write(lines)
    assert [payload.encode() for (payload,) in rows(store, "select payload from events order by position")] == lines


def test_a_second_process_is_told_that_the_file_is_taken(store: Store, home: Path) -> None:
    code = (
        "from pathlib import Path; from ledger.store import Store; from schemas.settings import LedgerSettings;"
        f"Store.open(Path({str(home / FILE)!r}), LedgerSettings())"
    )
    second = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False
    )
    assert second.returncode != 0
    assert "SetupError: the ledger's file can't be opened" in second.stderr
    assert str(os.getpid()) in second.stderr  # DuckDB names the owner


@pytest.mark.parametrize("table", [t for t in TABLES.values() if t != "facts.request_opens"])
@pytest.mark.parametrize("change", ["update {} set position = 7", "delete from {}", "truncate {}"])
def test_what_is_written_is_never_changed(store: Store, log: Log, table: str, change: str) -> None:
    log.write([*samples.whole(), samples.lost()])
    with pytest.raises(duckdb.Error, match="append-only"), store.cursor() as cursor:
        cursor.execute(change.format(table))
    assert rows(store, f"select count(*) from {table} where position <> 7")[0][0] > 0


def test_a_repeated_event_is_stored_once(store: Store, log: Log) -> None:
    """A page that came into the log twice must not be billed twice."""
    page = samples.whole()
    log.write(page)
    log.write([samples.accepted(2)], page)
    log.write(page[::-1])
    assert rows(store, "select count(*), count(distinct id), max(position) from events") == [(5, 5, 5)]
    assert rows(store, "select count(*), sum(cost_usd) = 0.0000087 from requests where status = 'completed'") == [
        (1, True)
    ]
    assert store.read_cursor(subjects.EVENTS).last_seq == 4


def test_a_line_that_is_no_event_stops_nothing_and_is_kept(store: Store, log: Log) -> None:
    log.write([samples.accepted(), b"\xff garbage", samples.finished()])
    assert rows(store, "select position, kind from events order by position") == [
        (1, "request.accepted"),
        (2, "unreadable"),
        (3, "request.finished"),
    ]
    assert rows(store, "select from_base64(payload ->> '$.bytes_base64') from events where kind = 'unreadable'") == [
        (b"\xff garbage",)
    ]


def test_a_number_that_no_column_holds_sets_its_event_aside(store: Store, log: Log) -> None:
    log.write([samples.accepted(), samples.finished(cost_pico=2**80), samples.finished(2)], [samples.finished(3)])
    assert rows(store, "select position, kind from events order by position") == [
        (1, "request.accepted"),
        (2, "unreadable"),
        (3, "request.finished"),
        (4, "request.finished"),
    ]
    assert rows(store, "select count(*) from requests where status = 'completed'") == [(2,)]


def test_texts_that_databases_fear_are_kept(store: Store, log: Log) -> None:
    for number, model in enumerate(["a\0b", "'; drop table events; --", "𝔪\U0010ffff", '"\\', "x" * 10_000], 1):
        log.write([samples.finished(number, model=model)])
        assert rows(store, "select model from requests where request_id = ?", [samples.uuid(number)]) == [(model,)]


def test_a_commit_that_fails_leaves_nothing(store: Store, log: Log) -> None:
    """Rows, cursor and all: the next try begins where the last commit ended."""
    log.write(samples.whole())
    before = store.read_cursor(subjects.EVENTS)
    wrong = StoredMessage("events.p", 2, samples.page(*samples.whole(2)))
    broken = before._replace(newest_event="not a uuid but greater")
    with pytest.raises(StoreFailed):
        store.append([wrong], broken)
    assert store.read_cursor(subjects.EVENTS) == before
    assert rows(store, "select count(*) from events") == [(4,)]
    store.append([wrong], before)
    assert rows(store, "select count(*) from events") == [(8,)]


def test_control_events_come_back_in_order(store: Store) -> None:
    control = Log(store, name=subjects.CONTROL)
    stated = [samples.org_stated(), samples.key_stated(), samples.route_stated()]
    control.write([stated[0]], [stated[1]], [b"broken"], [b'{"kind":"control.cause.stated","v":1}'], [stated[2]])
    assert store.control_events() == stated


def test_the_rows_are_the_tables_columns(store: Store) -> None:
    for cls, table in TABLES.items():
        columns = [row[0] for row in rows(store, f"describe {table}")]
        assert list(cls.__struct_fields__) == columns, table


def test_migrations_run_once_and_in_order(tmp_path: Path) -> None:
    first = [Migration(1, "one", "create table a as select 1 as x")]
    second = [*first, Migration(2, "two", "alter table a add column y int; insert into a values (2, 3)")]
    with duckdb.connect(str(tmp_path / "x.duckdb")) as connection:
        for known in (first, first, second, second):
            migrate(connection, known)
        assert connection.execute("from a order by x").fetchall() == [(1, None), (2, 3)]
        assert connection.execute("select number, name from state.migrations").fetchall() == [(1, "one"), (2, "two")]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    broken = [Migration(1, "one", "create table a as select 1 as x; select error('no')")]
    with duckdb.connect(str(tmp_path / "x.duckdb")) as connection, pytest.raises(duckdb.Error):
        migrate(connection, broken)
    with duckdb.connect(str(tmp_path / "x.duckdb")) as connection:
        migrate(connection, [Migration(1, "one", "create table a as select 2 as x")])
        assert connection.execute("from a").fetchall() == [(2,)]


def test_a_file_of_a_newer_release_is_refused(store: Store, open_store: Callable[..., Store]) -> None:
    with store.cursor() as cursor:
        cursor.execute("insert into state.migrations values (?, 'tomorrow', now())", [len(released()) + 1])
    store.close()
    with pytest.raises(SetupError, match="newer release"):
        open_store()


def test_the_database_reaches_nothing_outside_itself(store: Store, tmp_path: Path) -> None:
    """Even if the check of the syntax tree were blind."""
    outside = tmp_path / "outside.csv"
    outside.write_text("a\n1\n")
    for sql in (
        f"from read_csv('{outside}')",
        f"from '{outside}'",
        f"copy (select 1) to '{tmp_path / 'out.csv'}'",
        f"attach '{tmp_path / 'other.duckdb'}'",
        "install httpfs",
        "set enable_external_access = true",
        "set lock_configuration = false",
        "set memory_limit = '100GB'",
    ):
        with pytest.raises(duckdb.Error), store.cursor() as cursor:
            cursor.execute(sql)
    assert not (tmp_path / "out.csv").exists()


def test_a_query_that_outgrows_its_memory_spills_into_the_ledgers_folder(
    open_store: Callable[..., Store], home: Path
) -> None:
    store = open_store(sql_memory_mib=128)
    sql = "select count(*) from (select range::varchar || repeat('x', 50) as a from range(2000000) order by 1)"
    assert rows(store, sql) == [(2_000_000,)]
    store.close()
    assert [path.name for path in (home / FILE).parent.iterdir()] == ["ledger.duckdb"]
    assert LedgerSettings().sql_memory_mib >= 128


def test_a_ledger_of_before_learns_which_prices_were_known_and_whose_its_open_requests_are(tmp_path: Path) -> None:
    ended = [samples.finished(1, price=UNKNOWN), samples.finished(2)]
    with duckdb.connect(str(tmp_path / "old.duckdb")) as connection:
        migrate(connection, released()[:5])
        for position, event in enumerate([*ended, samples.accepted(3, producer="ingress-of-old")], 1):
            connection.execute(
                "insert into events (log, position, stream_seq, id, kind, request_id, producer, payload) "
                "values ('EVENTS', ?, 1, ?, ?, ?, ?, ?)",
                [
                    position,
                    event.id,
                    event.__struct_config__.tag,
                    event.request_id,
                    event.producer,
                    encode(event).decode(),
                ],
            )
        connection.execute(
            "insert into facts.request_ends (position, request_id, status) select 1, ?, 'completed'", [samples.uuid(1)]
        )
        connection.execute(
            "insert into facts.request_ends (position, request_id, status) select 2, ?, 'completed'", [samples.uuid(2)]
        )
        connection.execute("insert into facts.request_opens (position, request_id) select 3, ?", [samples.uuid(3)])
        migrate(connection)
        told = connection.execute("select price_known from requests order by request_id").fetchall()
        assert told == [(False,), (True,), (None,)]
        opens = connection.execute("select ingress, announced from facts.request_opens").fetchall()
        assert opens == [("ingress-of-old", False)]
        with pytest.raises(duckdb.Error, match="append-only"):
            connection.execute("update facts.request_ends set cost_pico = 0")
