"""Read-only SQL for analysts, with every limit: one statement, one cursor, bounds on time, memory, rows, bytes and concurrency.

A query runs in a thread of its own and can be given up at any moment; it never holds the writer's connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb

from ledger.guard import check
from ledger.problems import SqlError, SqlOutOfMemory, SqlTimeout, TooManyQueries
from ledger.render import Bounds, Format, Rendered, render_columns, render_rows, types_of
from schemas.errors import Stopping
from schemas.settings import LedgerSettings

PARAMS_MAX = 1000
INTERRUPT_EVERY_S = 0.05  # an interrupt that comes before the query has begun is lost, so it is repeated
GIVE_UP_AFTER_S = 2.0  # some functions can't be interrupted; neither a client nor a shutdown waits longer for them

_WITH_ZONE = "TIMESTAMP WITH TIME ZONE"


class Queries:
    """Runs analysts' queries, each on a cursor of its own that *open_cursor* makes."""

    def __init__(self, open_cursor: Callable[[], duckdb.DuckDBPyConnection], settings: LedgerSettings) -> None:
        self._open_cursor = open_cursor
        self._timeout_s = settings.sql_timeout_s
        self._max = settings.sql_max_concurrent
        self._bounds = Bounds(settings.sql_max_rows, settings.sql_max_result_bytes)
        self._threads = ThreadPoolExecutor(self._max, thread_name_prefix="sql")
        self._running: dict[asyncio.Future[Rendered], duckdb.DuckDBPyConnection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def running(self) -> int:
        return len(self._running)

    async def run(self, sql: str, params: Sequence[Any], format_: Format) -> Rendered:
        """The result of *sql*. To cancel this is to give the query up.

        Raises: SqlError, SqlRefused, SqlTimeout, SqlOutOfMemory, ResultTooLarge; TooManyQueries at once at the bound; Stopping
        once it is closed.
        """
        if self._closed:
            raise Stopping
        if len(self._running) >= self._max:
            raise TooManyQueries
        if len(params) > PARAMS_MAX:
            raise SqlError(f"There are more than {PARAMS_MAX} parameters.", param="params")
        work = self._begin(sql, params, format_)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(work)
        except TimeoutError:
            await self._give_up(work)
            raise SqlTimeout(f"The query took longer than the limit of {self._timeout_s:g} s.") from None
        except SqlTimeout as error:
            raise Stopping if self._closed else error from None
        except asyncio.CancelledError:
            task = asyncio.create_task(self._give_up(work), name="give-up-query")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            raise

    def interrupt_all(self) -> None:
        """Gives every running query up: the writer needs the memory, or the process ends."""
        for cursor in list(self._running.values()):
            cursor.interrupt()

    async def close(self) -> None:
        """Begins no more, and gives up what runs; waits at most `GIVE_UP_AFTER_S` for it."""
        self._closed = True
        await asyncio.gather(*(self._give_up(work) for work in list(self._running)))
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, sql: str, params: Sequence[Any], format_: Format) -> asyncio.Future[Rendered]:
        cursor = self._open_cursor()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, _run, cursor, sql, params, format_, self._bounds)
        self._running[work] = cursor
        work.add_done_callback(self._forget)
        return work

    def _forget(self, work: asyncio.Future[Rendered]) -> None:
        self._running.pop(work, None)
        if not work.cancelled():
            work.exception()  # whoever waited for it may have left

    async def _give_up(self, work: asyncio.Future[Rendered]) -> None:
        """Interrupts until the query has ended. One that can't be interrupted keeps its place until it ends by itself."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GIVE_UP_AFTER_S):
                while not work.done():
                    if (cursor := self._running.get(work)) is not None:
                        cursor.interrupt()
                    await asyncio.wait([work], timeout=INTERRUPT_EVERY_S)


def _run(
    cursor: duckdb.DuckDBPyConnection, sql: str, params: Sequence[Any], format_: Format, bounds: Bounds
) -> Rendered:
    try:
        check(cursor, sql)
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        if format_ in (Format.ARROW, Format.PARQUET):
            return render_columns(cursor.query(sql, params=list(params)), format_, bounds)
        cursor.execute(sql, list(params))
        columns = types_of(cursor)
        if any(type_ == _WITH_ZONE for _, type_ in columns):
            cursor.abort()
            cursor.execute(_in_utc(_only_statement(cursor, sql), columns), list(params))
        return render_rows(cursor, format_, bounds)
    except duckdb.InterruptException as error:
        raise SqlTimeout("The query was given up.") from error
    except (duckdb.OutOfMemoryException, MemoryError) as error:
        reason = str(error).split("\n", 1)[0]
        raise SqlOutOfMemory(f"The query needs more memory than the ledger gives to queries. {reason}") from error
    except duckdb.Error as error:
        raise SqlError(str(error)) from error
    finally:
        cursor.close()  # ends the transaction, and whatever of the result was not read


def _only_statement(cursor: duckdb.DuckDBPyConnection, sql: str) -> str:
    return cursor.extract_statements(sql)[0].query.rstrip().rstrip(";")


def _in_utc(query: str, columns: Sequence[tuple[str, str]]) -> str:
    """*query* with its times in UTC: DuckDB hands times with a zone to Python only through a library that we don't carry."""
    wanted = ", ".join(
        f"#{place} AT TIME ZONE 'UTC' AS {_quoted(name)}" if type_ == _WITH_ZONE else f"#{place} AS {_quoted(name)}"
        for place, (name, type_) in enumerate(columns, 1)
    )
    return f"SELECT {wanted} FROM (\n{query}\n)"  # noqa: S608 - the analyst's own query, checked before


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
