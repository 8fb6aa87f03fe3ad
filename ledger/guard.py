"""What an analyst's SQL may say, decided on its syntax tree before it runs.

Three walls stand behind one another: this check; a read-only transaction on a cursor of its own; and a database that can't reach
files or the network and whose configuration is locked. A check of the statement's type alone would let
``WITH x AS (INSERT …) SELECT …`` pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import duckdb
import msgspec

from ledger.problems import SqlError, SqlRefused

SQL_MAX_CHARS = 100_000
TREE_MAX_NODES = 200_000

VIEWS = frozenset(
    {
        "events",
        "requests",
        "attempts",
        "usage_by_model",
        "usage_by_route",
        "usage_by_key",
        "usage_by_day",
        "audit_log",
    }
)

# Relations of DuckDB itself that describe ours and give nothing else away.
_CATALOG = frozenset({"duckdb_columns", "duckdb_views", "duckdb_functions"})
_INFORMATION_SCHEMA = frozenset({"columns", "tables", "views", "schemata"})
_SYSTEM_PREFIXES = ("duckdb_", "pragma_", "sqlite_", "pg_", "information_schema")
_TABLE_FUNCTIONS = frozenset({"unnest", "range", "generate_series", "json_each", "json_tree"}) | _CATALOG

_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})

# Scalar functions that reach outside the data, wait, write, or take raw bytes for granted.
_FUNCTIONS_REFUSED = frozenset(
    {
        "current_setting",
        "getenv",
        "getvariable",
        "which_secret",
        "write_log",
        "sleep_ms",
        "pg_sleep",
        "nextval",
        "currval",
        "setval",
        "setseed",
        "json_serialize_plan",
        "json_execute_serialized_sql",
        "query",
        "query_table",
        "variant_bytes_to_variant",
        "to_aggregate_state",
        "combine",
        "finalize",
    }
)
_FUNCTION_PREFIXES_REFUSED = ("__internal", "read_", "pragma_", "duckdb_", "test_")

_SHOWS = {"DESCRIBE", "SUMMARY"}
_SHOW_TABLES = ('"tables"', "tables")


def check(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Returns if *sql* is one statement that only reads what analysts may read.

    Raises: SqlError if it can't be parsed, SqlRefused if it may not run.
    """
    if len(sql) > SQL_MAX_CHARS:
        raise SqlRefused(f"The SQL is longer than {SQL_MAX_CHARS} characters.")
    statements = parse(connection, sql)
    if len(statements) != 1:
        raise SqlRefused("Send exactly one statement." if statements else "There is no statement in this SQL.")
    check_tree(statements[0])


def parse(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    """The syntax trees of the statements in *sql*.

    Raises: SqlError if it is no SQL, SqlRefused if a statement is not a query.
    """
    try:
        kinds = {statement.type for statement in connection.extract_statements(sql)}
    except duckdb.Error as error:
        raise SqlError(str(error)) from error
    if not kinds:
        return []
    if kinds != {duckdb.StatementType.SELECT}:
        raise SqlRefused(
            "Only queries can run here: SELECT, WITH … SELECT, FROM, VALUES, DESCRIBE, SUMMARIZE or SHOW TABLES."
        )
    row = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [sql]).fetchone()
    try:
        tree: dict[str, Any] = msgspec.json.decode(row[0]) if row else {"error": True}
    except RecursionError as error:
        raise SqlRefused("This query is nested too deeply.") from error
    if tree["error"]:
        raise SqlRefused(
            f"This statement can't be checked, so it can't run here: {tree.get('error_message', 'no tree')}"
        )
    statements: list[dict[str, Any]] = tree["statements"]
    return statements


def check_tree(statement: dict[str, Any]) -> None:
    """Raises: SqlRefused."""
    nodes = list(_walk(statement))
    own_names = {str(entry["key"]).lower() for node in nodes for entry in _ctes(node)}
    for name in own_names:
        if name.startswith(_SYSTEM_PREFIXES):
            raise SqlRefused(f"A WITH query may not be called {name}.")
    for node in nodes:
        match node.get("type"):
            case str(type_) if type_.endswith("_NODE") and type_ not in _NODES:
                raise SqlRefused("Only queries can run here; this one would change something.")
            case "BASE_TABLE":
                _check_relation(node, own_names)
            case "SHOW_REF":
                _check_show(node)
            case "TABLE_FUNCTION":
                _check_table_function(node)
        if "function_name" in node:
            _check_function(str(node["function_name"]).lower())


def _check_relation(node: dict[str, Any], own_names: set[str]) -> None:
    path = [str(part).lower() for part in node["qualified_name"]["path"]]
    match path:
        case [name] if name in own_names or name in VIEWS or name in _CATALOG:
            return
        case [*_, "main", name] if name in VIEWS:
            return
        case [*_, "information_schema", name] if name in _INFORMATION_SCHEMA:
            return
    raise SqlRefused(
        f"There is no table {'.'.join(path)} for you here. SHOW TABLES lists those that there are: {', '.join(sorted(VIEWS))}."
    )


def _check_show(node: dict[str, Any]) -> None:
    if node["show_type"] in _SHOWS and node["query"] is not None:
        return  # of a query, which is checked like any other
    if node["table_name"] in _SHOW_TABLES:
        return
    raise SqlRefused("Of the SHOW statements only SHOW TABLES and DESCRIBE can run here.")


def _check_table_function(node: dict[str, Any]) -> None:
    name = str(node["function"]["function_name"]).lower()
    if name not in _TABLE_FUNCTIONS:
        raise SqlRefused(f"The table function {name} can't be used here.")


def _check_function(name: str) -> None:
    if name in _FUNCTIONS_REFUSED or (name.startswith(_FUNCTION_PREFIXES_REFUSED) and name not in _TABLE_FUNCTIONS):
        raise SqlRefused(f"The function {name} can't be used here.")


def _ctes(node: dict[str, Any]) -> list[dict[str, Any]]:
    cte_map = node.get("cte_map")
    found: list[dict[str, Any]] = cte_map["map"] if isinstance(cte_map, dict) else []
    return found


def _walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in *tree*.

    Raises: SqlRefused beyond `TREE_MAX_NODES`.
    """
    waiting: list[Any] = [tree]
    seen = 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            seen += 1
            if seen > TREE_MAX_NODES:
                raise SqlRefused("This query is too large.")
            yield part
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
