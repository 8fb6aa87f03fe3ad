"""The tables' history: numbered SQL files, run once each, in order, never backwards. A released file is never edited."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import NamedTuple

import duckdb
import structlog

from schemas.errors import SetupError

log = structlog.get_logger()

_NAME = re.compile(r"(\d{4})_(\w+)\.sql")


class Migration(NamedTuple):
    number: int
    name: str
    sql: str


def migrate(connection: duckdb.DuckDBPyConnection, migrations: list[Migration] | None = None) -> None:
    """Runs the migrations that this file hasn't seen, each in a transaction of its own.

    Raises: SetupError if a newer release wrote the file.
    """
    known = released() if migrations is None else migrations
    connection.execute("CREATE SCHEMA IF NOT EXISTS state")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS state.migrations (number BIGINT NOT NULL, name VARCHAR NOT NULL, run_at TIMESTAMP)"
    )
    row = connection.execute("SELECT coalesce(max(number), 0) FROM state.migrations").fetchone()
    done = int(row[0]) if row else 0
    if done > known[-1].number:
        raise SetupError(
            f"a newer release wrote this ledger (its tables are at {done:04}, ours at {known[-1].number:04})"
        )
    for migration in known:
        if migration.number <= done:
            continue
        connection.execute("BEGIN TRANSACTION")
        connection.execute(migration.sql)
        connection.execute(
            "INSERT INTO state.migrations VALUES (?, ?, now() AT TIME ZONE 'UTC')", [migration.number, migration.name]
        )
        connection.execute("COMMIT")
        log.debug("migration_run", number=migration.number, name=migration.name)


def released() -> list[Migration]:
    """The migrations of this release: numbers from 1 without gaps."""
    named = ((_NAME.fullmatch(file.name), file) for file in files("ledger").joinpath("sql").iterdir())
    found = [Migration(int(match[1]), match[2], file.read_text(encoding="utf-8")) for match, file in named if match]
    found.sort()
    assert [m.number for m in found] == list(range(1, len(found) + 1)), "migrations have a gap"  # noqa: S101
    return found
