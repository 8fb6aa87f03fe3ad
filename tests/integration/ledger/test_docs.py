"""docs/sql.md says what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ledger.guard import VIEWS, check
from ledger.store import Store
from schemas.settings import LedgerSettings
from tests.integration.ledger.conftest import rows

TEXT = (Path(__file__).parents[3] / "docs" / "sql.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_every_column_is_documented_with_its_type_and_words(store: Store, view: str) -> None:
    columns = rows(store, "select column_name, data_type, comment from duckdb_columns() where table_name = ?", [view])
    assert columns
    for name, type_, comment in columns:
        in_a_table = f"| `{name}` | {type_} | {comment} |"
        in_a_list = f"`{name}` ({type_}): {comment[0].lower()}{comment[1:].rstrip('.')}"
        assert in_a_table in TEXT or in_a_list in TEXT, f"{view}.{name}"


def test_every_query_in_it_runs(store: Store) -> None:
    queries = [q for block in re.findall(r"```sql\n(.*?)```", TEXT, re.DOTALL) for q in block.split(";") if q.strip()]
    assert len(queries) >= 6
    for query in queries:
        with store.cursor() as cursor:
            check(cursor, query)
            cursor.execute(query, ["0190b3a4-5c6d-7e8f-8a0b-1c2d3e4f5a6b"] if "= ?" in query else []).fetchall()


def test_every_limit_has_its_default(store: Store) -> None:
    for name, shown in {
        "sql_timeout_s": "30 s",
        "sql_max_rows": "100,000",
        "sql_max_result_bytes": "64 MiB",
        "sql_max_concurrent": "4",
        "sql_memory_mib": "256 MiB",
        "sql_threads": "2",
    }.items():
        number = float(re.sub(r"[^\d]", "", shown.split(" ")[0]))
        unit = 1024**2 if "MiB" in shown and not name.endswith("_mib") else 1
        assert getattr(LedgerSettings(), name) == number * unit
        assert re.search(rf"\| {re.escape(shown)}.*`{name}`", TEXT)
