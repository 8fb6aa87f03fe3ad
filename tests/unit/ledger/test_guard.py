"""What analysts' SQL may say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import duckdb
import pytest

from ledger.guard import SQL_MAX_CHARS, check
from ledger.problems import SqlError, SqlRefused


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        yield made


@pytest.fixture
def connection(database: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
    with database.cursor() as made:
        yield made


READS = [
    "select model, sum(cost_usd) from requests group by model order by 2 desc limit 5",
    "SELECT * FROM Requests",
    "from usage_by_model",
    "table attempts",
    "values (1)",
    "select 1;",
    "with r as (from requests), s as (select * from r) select count(*) from s",
    "with recursive n as (select 1 x union all select x + 1 from n where x < 5) select * from n",
    "select * from requests r join attempts a using (request_id)",
    "select * from main.requests",
    "select (select max(ts) from events), exists (from audit_log)",
    "select unnest([1, 2]), list_transform([1], lambda x: x + 1)",
    "select * from range(10), generate_series(1, 3)",
    "select payload ->> '$.model', payload.model from events",
    "from requests pivot (count(*) for status in ('completed', 'failed'))",
    "select date_trunc('hour', accepted_at) h, quantile_cont(duration_ms, 0.5) from requests group by h having count(*) > 1",
    "select row_number() over (partition by model order by accepted_at) from requests qualify 1 = 1",
    "select * from requests union all by name select * from requests",
    "describe requests",
    "describe select 1 as a",
    "summarize usage_by_day",
    "show tables",
    "select * from information_schema.columns",
    "select column_name, comment from duckdb_columns() where table_name = 'requests'",
    "select * from requests where request_id = ? and model = ?",
]

REFUSED = [
    "",
    "-- nothing",
    "select 1; select 2",
    "select 1; drop table events",
    "insert into events select * from events",
    "update events set kind = 'x'",
    "delete from events",
    "truncate events",
    "drop view requests",
    "create table x as select 1",
    "create temp table x as select 1",
    "create macro f() as 1",
    "alter table events add column x int",
    "with x as (insert into events select * from events returning 1) select * from x",
    "with x as (delete from events returning 1) select * from x",
    "with x as (update events set kind = 'x' returning 1) select * from x",
    "select * from (with x as (delete from events returning 1) from x)",
    "commit",
    "rollback",
    "begin",
    "checkpoint",
    "vacuum",
    "analyze",
    "pragma database_list",
    "pragma table_info('events')",
    "set threads = 1",
    "reset threads",
    "use main",
    "attach 'x.duckdb'",
    "attach ':memory:' as m",
    "detach ledger",
    "copy events to 'x.csv'",
    "copy (select 1) to 'x.parquet'",
    "copy events from 'x.csv'",
    "export database 'x'",
    "import database 'x'",
    "install httpfs",
    "load httpfs",
    "call pragma_version()",
    "prepare p as select 1",
    "execute p",
    "explain select 1",
    "explain analyze delete from events",
    "select * from read_csv('/etc/passwd')",
    "select * from read_text('/etc/passwd')",
    "select * from read_blob('/etc/passwd')",
    "select * from read_parquet('x')",
    "select * from read_json('x')",
    "select * from read_duckdb('x')",
    "select * from parquet_metadata('x')",
    "select * from sniff_csv('x')",
    "select * from glob('/*')",
    "select * from '/etc/passwd'",
    "select * from 'https://example.com/x.csv'",
    "summarize 'x.csv'",
    "describe 'x.csv'",
    "select * from duckdb_settings()",
    "select * from duckdb_secrets()",
    "select * from duckdb_databases()",
    "select * from duckdb_logs()",
    "select * from system.main.duckdb_settings()",
    "select * from duckdb_databases",
    "select * from pragma_database_list",
    "select * from sqlite_master",
    "select * from pg_catalog.pg_settings",
    "select * from which_secret('x', 'y')",
    "with duckdb_databases as (select 1) select * from duckdb_databases",
    "show databases",
    "show all tables",
    "show settings",
    "select current_setting('temp_directory')",
    "select getenv('HOME')",
    "select getvariable('x')",
    "select sleep_ms(100000)",
    "select write_log('x')",
    "select nextval('s')",
    "select json_serialize_plan('select 1')",
    "select * from json_execute_serialized_sql('x')",
    "select * from query('select 1')",
    "select * from query_table('events')",
    "select * from histogram('events', 'kind')",
    "select * from arrow_scan(1, 2, 3)",
    "select * from seq_scan('events')",
    "select * from pandas_scan(1)",
    "select * from test_all_types()",
    "select * from enable_logging()",
    "select * from checkpoint()",
    "select * from requests where model = (select * from read_text('/etc/passwd'))",
    "select * from requests order by current_setting('x')",
    "select list_transform([1], lambda x: current_setting('y'))",
    "select sum(1) over (order by getenv('HOME'))",
    "select * from facts.request_ends",
    "select * from state.cursors",
    "select * from other.main.requests2",
    "select * from nothing",
    "select '" + "x" * SQL_MAX_CHARS + "'",
]


@pytest.mark.parametrize("sql", READS)
def test_a_query_over_the_views_may_run(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    check(connection, sql)


@pytest.mark.parametrize("sql", REFUSED, ids=lambda sql: sql[:60])
def test_anything_else_is_refused(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    with pytest.raises(SqlRefused):
        check(connection, sql)


@pytest.mark.parametrize("sql", ["selec 1", "select from where", "select '", "\0", "select * from requests where"])
def test_what_is_no_sql_is_told_with_the_databases_words(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    with pytest.raises((SqlError, SqlRefused)):
        check(connection, sql)


@pytest.mark.parametrize(
    "sql",
    [
        "select " + "(" * 20_000 + "1" + ")" * 20_000,
        "select " + "+".join(["1"] * 40_000),
        "select " + "not " * 20_000 + "true",
        "select " + "[" * 20_000 + "1" + "]" * 20_000,
        "select 1" + " union all select 1" * 5_000,
        "select * from " + "(select * from " * 5_000 + "requests" + ")" * 5_000,
    ],
    ids=["parentheses", "sum", "not", "lists", "union", "subqueries"],
)
def test_sql_as_deep_as_a_well_does_not_end_the_process(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    with contextlib.suppress(SqlError, SqlRefused):
        check(connection, sql)
    check(connection, "select 1")
