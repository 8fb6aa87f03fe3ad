"""Results as bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ledger.problems import ResultTooLarge
from ledger.render import Bounds, Format, Rendered, render_columns, render_rows

AMPLE = Bounds(1000, 1_000_000)


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        yield made


@pytest.fixture
def connection(database: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
    with database.cursor() as made:
        yield made


def rendered(connection: duckdb.DuckDBPyConnection, sql: str, format_: Format, bounds: Bounds = AMPLE) -> Rendered:
    if format_ in (Format.JSON, Format.CSV):
        return render_rows(connection.execute(sql), format_, bounds)
    return render_columns(connection.query(sql), format_, bounds)


def only_row(connection: duckdb.DuckDBPyConnection, sql: str) -> list[Any]:
    row: list[Any] = json.loads(rendered(connection, sql, Format.JSON).body)["rows"][0]
    return row


def test_json_has_columns_rows_and_their_count(connection: duckdb.DuckDBPyConnection) -> None:
    answer = json.loads(
        rendered(connection, "select 1::bigint as n, 'a' as t union all select 2, null", Format.JSON).body
    )
    assert answer == {
        "columns": [{"name": "n", "type": "BIGINT"}, {"name": "t", "type": "VARCHAR"}],
        "rows": [[1, "a"], [2, None]],
        "row_count": 2,
        "truncated": False,
    }


def test_json_of_no_rows_still_has_columns(connection: duckdb.DuckDBPyConnection) -> None:
    answer = json.loads(rendered(connection, "select 1 as n where false", Format.JSON).body)
    assert answer["columns"][0]["name"] == "n"
    assert answer["rows"] == []


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("0::decimal(38, 12)", "0.000000000000"),
        ("'12345678901234567890123456.000000000001'::decimal(38, 12)", "12345678901234567890123456.000000000001"),
        ("-0.000000000001::decimal(38, 12)", "-0.000000000001"),
        ("9223372036854775807::bigint", 9223372036854775807),
        ("170141183460469231731687303715884105727::hugeint", 170141183460469231731687303715884105727),
        ("0.1::double", 0.1),
        ("'nan'::double", "nan"),
        ("'-infinity'::double", "-inf"),
        ("timestamp '2026-11-20 12:00:00'", "2026-11-20T12:00:00Z"),
        ("timestamp '2026-11-20 12:00:00.000001'", "2026-11-20T12:00:00.000001Z"),
        ("date '2026-11-20'", "2026-11-20"),
        ("true", True),
        ("'\\x00\\xFF'::blob", "AP8="),
        ("'0190b3a4-5c6d-7e8f-8a0b-1c2d3e4f5a6b'::uuid", "0190b3a4-5c6d-7e8f-8a0b-1c2d3e4f5a6b"),
        ("""'{"a": [1, 0.10]}'::json""", {"a": [1, 0.1]}),
        ("[1.50::decimal(5, 2), null]", ["1.50", None]),
        ("{'at': timestamp '2026-11-20 12:00:00', 'x': 'nan'::double}", {"at": "2026-11-20T12:00:00Z", "x": "nan"}),
        ("map {'a': 1.5::decimal(3, 1)}", {"a": "1.5"}),
        ("interval 90 second", "PT90S"),
    ],
)
def test_json_loses_nothing(connection: duckdb.DuckDBPyConnection, sql: str, expected: object) -> None:
    assert only_row(connection, f"select {sql}") == [expected]


def test_a_json_column_keeps_its_text(connection: duckdb.DuckDBPyConnection) -> None:
    body = rendered(connection, """select '{"b":1,"a":0.100}'::json""", Format.JSON).body
    assert b'[{"b":1,"a":0.100}]' in body


def test_csv_reads_back_and_tells_null_from_empty(connection: duckdb.DuckDBPyConnection) -> None:
    sql = (
        """select 1 as n, 'a,"b"' || chr(10) as t, null as nothing, '' as empty, true as yes, 0::decimal(38, 12) as d"""
    )
    body = rendered(connection, sql, Format.CSV).body.decode()
    assert list(csv.reader(io.StringIO(body, newline=""))) == [
        ["n", "t", "nothing", "empty", "yes", "d"],
        ["1", 'a,"b"\n', "", "", "true", "0.000000000000"],
    ]
    assert ',,"",true' in body


def test_parquet_and_arrow_keep_types(connection: duckdb.DuckDBPyConnection) -> None:
    sql = "select 1.5::decimal(38, 12) as d, timestamp '2026-11-20 12:00:00' as t, null::bigint as n"
    as_parquet = pq.read_table(io.BytesIO(rendered(connection, sql, Format.PARQUET).body))
    as_arrow = pa.ipc.open_stream(rendered(connection, sql, Format.ARROW).body).read_all()
    for table in (as_parquet, as_arrow):
        assert table.schema.field("d").type == pa.decimal128(38, 12)
        assert str(table["d"][0]) == "1.500000000000"
        assert table["n"][0].as_py() is None


@pytest.mark.parametrize("format_", list(Format))
def test_a_result_is_cut_at_the_bound_of_rows_and_says_so(
    connection: duckdb.DuckDBPyConnection, format_: Format
) -> None:
    sql = "select range as n from range(3000)"
    cut = rendered(connection, sql, format_, Bounds(2500, 1_000_000))
    assert (cut.rows, cut.truncated) == (2500, True)
    whole = rendered(connection, sql, format_, Bounds(3000, 1_000_000))
    assert (whole.rows, whole.truncated) == (3000, False)


@pytest.mark.parametrize("format_", list(Format))
def test_a_result_is_cut_at_the_bound_of_bytes(connection: duckdb.DuckDBPyConnection, format_: Format) -> None:
    sql = "select repeat('x', 100) as t from range(10000)"
    cut = rendered(connection, sql, format_, Bounds(1_000_000, 500_000))
    assert cut.truncated
    assert 0 < cut.rows < 10_000
    assert len(cut.body) < 600_000


@pytest.mark.parametrize("format_", list(Format))
def test_a_single_row_over_the_bound_is_an_error(connection: duckdb.DuckDBPyConnection, format_: Format) -> None:
    with pytest.raises(ResultTooLarge):
        rendered(connection, "select repeat('x', 10000)", format_, Bounds(10, 5000))
