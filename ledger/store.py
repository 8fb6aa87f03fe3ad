"""The DuckDB file: open it, bring its tables up to date, store batches. One process, one writer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import duckdb
import structlog
from msgspec.structs import astuple

from bus.reader import StoredMessage
from ledger.batch import Batch, Cursor, Placed, make_batch, placed
from ledger.entries import too_large, unreadable
from ledger.migrations import migrate
from ledger.rows import TABLES
from schemas import subjects
from schemas.control import AnyControlEvent, ControlEvent
from schemas.errors import ServiceError, SetupError
from schemas.settings import LedgerSettings
from schemas.upcasters import read_event

log = structlog.get_logger()

FILE = Path("ledger") / "ledger.duckdb"  # within the home folder
WAL_MAX_MIB = 16  # what is not in the file yet takes memory: 16 MiB of log are about 20 MiB of it
TEMP_MAX_MIB = 4096  # what queries that outgrow their memory may use of the disk

# What a value raises that its column can't hold.
BAD_VALUE = (duckdb.InvalidInputException, duckdb.ConversionException, duckdb.OutOfRangeException)


class StoreFailed(ServiceError):
    """The ledger's file could not be written."""

    code = "ledger_not_writable"


class StoreOutOfMemory(StoreFailed):
    """The database has no memory left for the writer."""

    code = "ledger_out_of_memory"


class Store:
    """The ledger's tables. Its methods block and belong to one thread; queries use cursors of their own."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._for_queries = connection.cursor()  # never busy itself: a connection refuses what comes while it works
        self._appenders = {cls: connection.appender(table) for cls, table in TABLES.items()}

    @classmethod
    def open(cls, path: Path, settings: LedgerSettings) -> Self:
        """Opens or makes the file, and locks the database's configuration.

        Raises: SetupError if another process has it open, or a newer release wrote it.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            connection = duckdb.connect(str(path), config=_config(path, settings))
        except duckdb.Error as error:
            raise SetupError(
                f"the ledger's file can't be opened; if another ledger runs on it, stop that one first. DuckDB says: {error}"
            ) from error
        try:
            migrate(connection)
            # From here on nobody can reach a file or the network through this database, nor change that.
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            return cls(connection)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Writes what is in the write-ahead log into the file, and lets go of it.

        While a query still runs that can't be interrupted, the file stays open: the log beside it has everything.
        """
        try:
            self._for_queries.close()
            self._connection.close()
        except duckdb.ResourceInUseException:
            log.warning("file_left_open")

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own to the same database, for one query."""
        return self._for_queries.cursor()

    def read_cursor(self, name: str) -> Cursor:
        """How far the stream *name* has been read."""
        row = self._connection.execute(
            "SELECT log, last_seq, last_position, stream_created, newest_event::VARCHAR, newest_end::VARCHAR "
            "FROM state.cursors WHERE log = ?",
            [name],
        ).fetchone()
        assert row is not None, name  # noqa: S101 - the first migration made it
        log_name, last_seq, last_position, created, newest_event, newest_end = row
        return Cursor(log_name, last_seq, last_position, created, newest_event or "", newest_end or "")

    def bind_stream(self, name: str, created: str) -> None:
        """Notes which incarnation of the stream *name* this ledger follows."""
        self._connection.execute("UPDATE state.cursors SET stream_created = ? WHERE log = ?", [created, name])

    def control_events(self) -> list[AnyControlEvent]:
        """Everything stated so far, in order."""
        rows = self._connection.execute(
            "SELECT payload FROM events WHERE log = ? AND kind <> 'unreadable' ORDER BY position", [subjects.CONTROL]
        ).fetchall()
        read = (read_event(payload.encode()) for (payload,) in rows)
        return [event for event in read if isinstance(event, ControlEvent)]

    def append(self, messages: Sequence[StoredMessage], cursor: Cursor) -> tuple[Cursor, list[Placed]]:
        """Stores *messages*, which follow *cursor*, and the new cursor in one transaction.

        Returns the new cursor and the messages' entries. Raises: StoreFailed, StoreOutOfMemory; then nothing was stored.
        """
        entries = placed(messages, cursor.log)
        last_seq = messages[-1].seq
        try:
            try:
                batch = self._store(entries, cursor, last_seq=last_seq)
            except BAD_VALUE:
                entries = [_set_aside_if_too_large(p) for p in entries]
                batch = self._store(entries, cursor, last_seq=last_seq)
        except (duckdb.OutOfMemoryException, MemoryError) as error:
            raise StoreOutOfMemory from error
        except duckdb.Error as error:
            raise StoreFailed(f"the ledger's file could not be written: {error}") from error
        for seq, entry in entries:
            if entry.problem is not None:
                log.warning("line_unreadable", log=cursor.log, stream_seq=seq, problem=entry.problem)
        if batch.repeated:
            log.warning("events_repeated", log=cursor.log, events=batch.repeated, stream_seq=last_seq)
        return batch.cursor, entries

    def _store(self, entries: Sequence[Placed], cursor: Cursor, *, last_seq: int) -> Batch:
        with self._transaction():
            stored, over = self._known(entries, cursor)
            batch = make_batch(entries, cursor, last_seq=last_seq, stored=stored, over=over)
            for cls, rows in batch.rows.items():
                appender = self._appenders[cls]
                appender.append_rows(map(astuple, rows))
                appender.flush()
            if batch.ended:
                self._connection.execute(
                    "DELETE FROM facts.request_opens WHERE request_id IN (SELECT unnest($1::UUID[]))", [batch.ended]
                )
            self._connection.execute(
                "UPDATE state.cursors SET last_seq = $1, last_position = $2, newest_event = $3, newest_end = $4 WHERE log = $5",
                [
                    batch.cursor.last_seq,
                    batch.cursor.last_position,
                    batch.cursor.newest_event or None,
                    batch.cursor.newest_end or None,
                    cursor.log,
                ],
            )
        return batch

    def _known(self, entries: Sequence[Placed], cursor: Cursor) -> tuple[set[str], set[str]]:
        """Which of the entries' events are stored already, and which of their requests are over.

        Ids are ordered by time. What is newer than everything stored needs no look, and for the rest zone maps leave little.
        """
        ids = [e.id for _, e in entries if e.id is not None and e.id <= cursor.newest_event]
        requests = [e.request_id for _, e in entries if e.request_id is not None and e.request_id <= cursor.newest_end]
        return self._among("events", "id", ids), self._among("facts.request_ends", "request_id", requests)

    def _among(self, table: str, column: str, ids: list[str]) -> set[str]:
        if not ids:
            return set()
        found = self._connection.execute(
            f"SELECT {column}::VARCHAR FROM {table} "  # noqa: S608 - our own two tables
            f"WHERE {column} BETWEEN $1::UUID AND $2::UUID AND {column} IN (SELECT unnest($3::UUID[]))",
            [min(ids), max(ids), ids],
        ).fetchall()
        return {id_ for (id_,) in found}

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN TRANSACTION")
        try:
            yield
        except BaseException:
            for appender in self._appenders.values():
                appender.clear()
            with contextlib.suppress(duckdb.Error):  # it is the first error that matters
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _config(path: Path, settings: LedgerSettings) -> dict[str, str | bool | int | float | list[str]]:
    return {
        "memory_limit": f"{settings.sql_memory_mib}MiB",
        "threads": settings.sql_threads,
        "temp_directory": str(path.with_suffix(".tmp")),
        "max_temp_directory_size": f"{TEMP_MAX_MIB}MiB",
        "checkpoint_threshold": f"{WAL_MAX_MIB}MiB",
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
        "python_enable_replacements": False,  # a Python variable's name is no table
    }


def _set_aside_if_too_large(item: Placed) -> Placed:
    if item.entry.event is None or not too_large(item.entry.event):
        return item
    return Placed(item.seq, unreadable(item.entry.payload.encode(), "a number is out of range"))
