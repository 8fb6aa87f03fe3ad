"""Queries and their limits, on the ledger's own database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ledger.problems import SqlError, SqlOutOfMemory, SqlRefused, SqlTimeout, TooManyQueries
from ledger.query import PARAMS_MAX, Queries
from ledger.render import Format
from ledger.store import Store
from schemas.errors import Stopping
from schemas.settings import LedgerSettings
from tests.integration.ledger.conftest import Log
from tests.stopwatch import Stopwatch
from tests.unit.ledger import samples
from tests.waiting import eventually

ENDLESS = "select count(*) from range(1000000000000)"


@pytest.fixture
async def make_queries(store: Store) -> AsyncIterator[Callable[..., Queries]]:
    made: list[Queries] = []

    def make(**settings: Any) -> Queries:
        made.append(Queries(store.cursor, LedgerSettings(**settings)))
        return made[-1]

    yield make
    for queries in made:
        await queries.close()


@pytest.fixture
def queries(make_queries: Callable[..., Queries]) -> Queries:
    return make_queries(sql_timeout_s=10.0)


async def values(queries: Queries, sql: str, *params: Any) -> list[list[Any]]:
    found: list[list[Any]] = json.loads((await queries.run(sql, params, Format.JSON)).body)["rows"]
    return found


async def test_a_query_sees_what_is_stored(queries: Queries, log: Log) -> None:
    log.write(samples.whole())
    assert await values(queries, "select model, status, cost_usd from requests") == [
        ["m", "completed", "0.000008700000"]
    ]


async def test_parameters_stand_for_question_marks(queries: Queries, log: Log) -> None:
    log.write(samples.whole(1), samples.whole(2))
    sql = "select request_id from requests where request_id = ? and prompt_tokens > ?"
    assert await values(queries, sql, samples.uuid(2), 1) == [[samples.uuid(2)]]
    with pytest.raises(SqlError):
        await values(queries, sql, samples.uuid(2))
    with pytest.raises(SqlError):
        await values(queries, "select 1", 1)
    with pytest.raises(SqlError, match="parameters"):
        await values(queries, "select 1", *range(PARAMS_MAX + 1))


async def test_times_with_a_zone_are_told_in_utc(queries: Queries) -> None:
    sql = "select timestamptz '2026-11-20 12:00:00+02' as at, x from (values (2), (1)) v(x) order by x -- last; first"
    assert await values(queries, sql) == [["2026-11-20T10:00:00Z", 1], ["2026-11-20T10:00:00Z", 2]]
    assert await values(queries, "select now() > timestamp '2020-01-01' as a, now() as a;")


@pytest.mark.parametrize("sql", ["selec 1", "select nothing from requests", "select 1/'a'", "select error('mine')"])
async def test_the_databases_own_words_explain_an_error(queries: Queries, sql: str) -> None:
    with pytest.raises(SqlError, match="Error: "):
        await values(queries, sql)


async def test_a_data_modifying_cte_changes_nothing(queries: Queries, log: Log) -> None:
    """Its statement type is SELECT, which is why a check of the type is not enough."""
    with pytest.raises(SqlRefused):
        await values(queries, "with x as (insert into events select * from events returning 1) select * from x")


async def test_the_second_wall_stands_without_the_first(
    queries: Queries, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write(samples.whole())
    monkeypatch.setattr("ledger.query.check", lambda *_: None)
    for sql in (
        "with x as (insert into events select * from events returning 1) select * from x",
        "delete from facts.request_opens",
        "create table t as select 1",
        "select * from read_csv('/etc/passwd')",
        "copy (select 1) to '/tmp/x.csv'",
        "set threads = 1",
        "install httpfs",
    ):
        with pytest.raises(SqlError):
            await values(queries, sql)
    assert await values(queries, "select count(*) from events") == [[4]]


async def test_a_query_ends_at_its_limit_of_time(make_queries: Callable[..., Queries]) -> None:
    queries = make_queries(sql_timeout_s=0.3)
    watch = Stopwatch()
    with pytest.raises(SqlTimeout, match=r"limit of 0\.3 s"):
        await values(queries, ENDLESS)
    assert watch.s < 2
    assert queries.running == 0


async def test_a_result_without_end_is_cut_and_leaves_nothing_running(make_queries: Callable[..., Queries]) -> None:
    queries = make_queries(sql_max_rows=10)
    result = await queries.run("select range as n from range(1000000000000)", [], Format.CSV)
    assert (result.rows, result.truncated) == (10, True)
    assert queries.running == 0


async def test_one_query_too_many_is_refused_at_once(make_queries: Callable[..., Queries]) -> None:
    queries = make_queries(sql_max_concurrent=2, sql_timeout_s=5.0)
    running = [asyncio.create_task(values(queries, ENDLESS)) for _ in range(2)]
    await eventually(lambda: queries.running == 2)
    with pytest.raises(TooManyQueries):
        await values(queries, "select 1")
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await eventually(lambda: queries.running == 0, what="the cancelled queries have given up their places")
    assert await values(queries, "select 1") == [[1]]


async def test_a_cancelled_query_stops_working(make_queries: Callable[..., Queries]) -> None:
    queries = make_queries(sql_timeout_s=30.0)
    task = asyncio.create_task(values(queries, ENDLESS))
    await eventually(lambda: queries.running == 1)
    task.cancel()
    await eventually(lambda: queries.running == 0)


async def test_who_asks_while_the_ledger_stops_is_told_so(queries: Queries) -> None:
    running = asyncio.create_task(values(queries, ENDLESS))
    await eventually(lambda: queries.running == 1)
    await queries.close()
    with pytest.raises(Stopping):
        await running
    with pytest.raises(Stopping):
        await values(queries, "select 1")


async def test_a_query_that_wants_too_much_memory_fails_alone(open_store: Callable[..., Store]) -> None:
    store = open_store(sql_memory_mib=128)
    queries = Queries(store.cursor, LedgerSettings())
    with pytest.raises(SqlOutOfMemory):
        await values(queries, "select len(list(range)) from range(300000000)")
    Log(store).write(samples.whole())
    assert await values(queries, "select count(*) from events") == [[4]]
    await queries.close()


async def test_a_reader_sees_one_moment_while_the_writer_goes_on(queries: Queries, log: Log) -> None:
    """Every answer is a consistent state: as many requests as finishing events."""
    sql = "select (select count(*) from requests), (select count(*) from events where kind = 'request.finished')"
    for number in range(1, 40):
        asking = asyncio.create_task(values(queries, sql))
        await asyncio.to_thread(log.write, samples.whole(number))
        [[requests, events]] = await asking
        assert requests == events
