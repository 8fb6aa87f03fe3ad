"""A query's result as bytes: JSON, CSV, Arrow or Parquet. Cut at a number of rows or bytes, and then it says so.

Nothing loses digits: a DECIMAL is a text in JSON, an integer is a number however large it is, a float that is no number is a text.
Times are ISO 8601 and UTC, and end in Z; a JSON column is JSON within the answer; bytes are base64.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, NamedTuple

import duckdb
import msgspec

from ledger.problems import ResultTooLarge

ROWS_AT_A_TIME = 1024

Convert = Callable[[Any], Any]


class Format(StrEnum):
    JSON = "json"
    CSV = "csv"
    ARROW = "arrow"
    PARQUET = "parquet"


class Bounds(NamedTuple):
    max_rows: int
    max_bytes: int


class Rendered(NamedTuple):
    body: bytes
    media_type: str
    rows: int
    truncated: bool


MEDIA_TYPES = {
    Format.JSON: "application/json",
    Format.CSV: "text/csv; charset=utf-8; header=present",
    Format.ARROW: "application/vnd.apache.arrow.stream",
    Format.PARQUET: "application/vnd.apache.parquet",
}


def render_rows(result: duckdb.DuckDBPyConnection, format_: Format, bounds: Bounds) -> Rendered:
    """The open result as JSON or CSV, read to its end or to *bounds*.

    Raises: duckdb.Error while rows are made; ResultTooLarge if not even one row fits.
    """
    columns = types_of(result)
    if format_ is Format.JSON:
        head = b'{"columns":' + _encode([{"name": name, "type": type_} for name, type_ in columns]) + b',"rows":['
        between, line_of = b",", _encode
    else:
        head = _csv_line([name for name, _ in columns]) + b"\r\n"
        between, line_of = b"\r\n", _csv_line
    out, count, truncated = bytearray(head), 0, False
    for row in _rows(result, [_converter(type_) for _, type_ in columns]):
        line = line_of(row)
        if count >= bounds.max_rows or len(out) + len(line) > bounds.max_bytes:
            truncated = True
            break
        if count:
            out += between
        out += line
        count += 1
    if truncated and not count:
        raise ResultTooLarge
    if format_ is Format.JSON:
        out += b'],"row_count":%d,"truncated":%b}' % (count, b"true" if truncated else b"false")
    elif count:
        out += b"\r\n"
    return Rendered(bytes(out), MEDIA_TYPES[format_], count, truncated)


def render_columns(result: duckdb.DuckDBPyRelation, format_: Format, bounds: Bounds) -> Rendered:
    """*result* as Arrow or Parquet; otherwise like `render_rows`."""
    import pyarrow as pa  # noqa: PLC0415 - 0.2 s and 50 MB that only these two formats need
    import pyarrow.parquet as pq  # noqa: PLC0415

    reader = result.to_arrow_reader(ROWS_AT_A_TIME)
    batches: list[Any] = []
    count, size, truncated = 0, 0, False
    for batch in reader:
        room = bounds.max_rows - count
        if size + batch.nbytes > bounds.max_bytes or batch.num_rows > room:
            truncated = True
            if size + batch.nbytes <= bounds.max_bytes and room:
                batches.append(batch.slice(0, room))
                count += room
            break
        batches.append(batch)
        count += batch.num_rows
        size += batch.nbytes
    if truncated and not count:
        raise ResultTooLarge
    table = pa.Table.from_batches(batches, schema=reader.schema)
    sink = io.BytesIO()
    if format_ is Format.PARQUET:
        pq.write_table(table, sink, compression="zstd")
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return Rendered(sink.getvalue(), MEDIA_TYPES[format_], count, truncated)


def types_of(result: duckdb.DuckDBPyConnection) -> list[tuple[str, str]]:
    """The name and type of each column of the open result."""
    return [(str(name), str(type_).strip('"')) for name, type_, *_ in result.description or ()]


def _rows(result: duckdb.DuckDBPyConnection, converters: list[Convert | None]) -> Iterator[list[Any]]:
    plain = not any(converters)
    while rows := result.fetchmany(ROWS_AT_A_TIME):
        for row in rows:
            if plain:
                yield list(row)
            else:
                yield [
                    value if convert is None or value is None else convert(value)
                    for value, convert in zip(row, converters, strict=True)
                ]


def _converter(type_: str) -> Convert | None:
    """What makes a value of *type_* fit for JSON and CSV; None if it is already."""
    if "[" in type_ or type_.startswith(("STRUCT", "MAP", "UNION", "VARIANT")):
        return _nested
    match type_:
        case "JSON":
            return lambda text: msgspec.Raw(text.encode())
        case "DOUBLE" | "FLOAT":
            return _float
        case "TIMESTAMP" | "TIMESTAMP_S" | "TIMESTAMP_MS" | "TIMESTAMP_NS":
            return _time
        case _ if type_.startswith("DECIMAL"):
            return _decimal
        case _:
            return None


def _nested(value: Any) -> Any:
    match value:
        case dict():
            return {key: _nested(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_nested(inner) for inner in value]
        case float():
            return _float(value)
        case Decimal():
            return _decimal(value)
        case datetime():
            return _time(value)
        case _:
            return value


def _float(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _decimal(value: Decimal) -> str:
    return format(value, "f")  # never 0E-12


def _time(value: datetime) -> str:
    return f"{value.isoformat()}Z"


def _encode_other(value: Any) -> Any:
    return str(value)


_encode = msgspec.json.Encoder(enc_hook=_encode_other).encode


def _csv_line(row: list[Any]) -> bytes:
    """RFC 4180. NULL is an empty field; an empty text is a quoted one."""
    return ",".join(["" if value is None else _csv_field(value) for value in row]).encode()


def _csv_field(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            text = value
        case int() | float():
            return str(value)
        case msgspec.Raw():
            text = bytes(value).decode()
        case _:
            encoded = _encode(value).decode()
            text = encoded[1:-1] if encoded.startswith('"') else encoded
    if not text or any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text
