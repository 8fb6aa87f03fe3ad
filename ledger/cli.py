"""The ledger's commands: its process, `sql` and `explain`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from ledger.client import Answer, Table, ask, find_ledger, table_of
from schemas.errors import SetupError
from schemas.ids import RequestId, request_id_of
from schemas.local import home_folder
from schemas.settings import load

if TYPE_CHECKING:
    from ledger.explain import Life

EXIT_TRUNCATED = 3
SQL_MAX_BYTES = 1024 * 1024  # what is read of standard input
NUMBERS = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|DOUBLE|FLOAT|DECIMAL")


@click.group(
    invoke_without_command=True,
    epilog="Example: PENSTOCK_NATS=nats://127.0.0.1:4222 penstock ledger --home /var/lib/penstock --port 8001",
)
@click.option("--nats", "nats_url", envvar="PENSTOCK_NATS", help="The NATS server or cluster.")
@click.option("--home", help="The folder that holds the ledger's file.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="penstock.toml")
@click.option("--host", help="The address of the SQL endpoint.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port of the SQL endpoint; 0 is any free one.")
@click.option("--fd", type=int, help="A listening socket to serve on instead of a port.")
@click.option("--ready-file", type=click.Path(path_type=Path, dir_okay=False), help="Written once it serves.")
@click.pass_context
def ledger(
    context: click.Context,
    *,
    nats_url: str | None,
    home: str | None,
    config: Path | None,
    host: str | None,
    port: int | None,
    fd: int | None,
    ready_file: Path | None,
) -> None:
    """Run the ledger: it stores every event exactly once and answers SQL.

    One process for a deployment. SIGTERM stores what is still to be had, then ends it; a crash loses nothing.
    """
    if context.invoked_subcommand is not None:
        return
    if nats_url is None:
        raise click.UsageError("say which NATS to read from: --nats URL, or PENSTOCK_NATS.")
    import uvloop  # noqa: PLC0415 - `--help` needs none of this

    from ledger.process import Place, run_ledger  # noqa: PLC0415
    from schemas.logs import configure  # noqa: PLC0415

    configure("ledger")
    settings = load(config, ledger={"host": host, "port": port})
    place = Place(home=home_folder(home or settings.home), nats_url=nats_url, fd=fd, ready_file=ready_file)
    uvloop.run(run_ledger(settings, place))


@click.command(epilog='Example: penstock sql "select model, status, completion_tokens, cost_usd from requests"')
@click.argument("query")
@click.option(
    "--format", "format_", type=click.Choice(["table", "csv", "json", "parquet"]), default="table", show_default=True
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead.")
@click.option("--home", help="The folder of the running `penstock up`.")
@click.option(
    "--ledger-url", help="A ledger elsewhere, with the key in PENSTOCK_API_KEY. Default: PENSTOCK_LEDGER_URL."
)
def sql(query: str, *, format_: str, output: Path | None, home: str | None, ledger_url: str | None) -> None:
    """Ask the ledger. QUERY is one SQL query, or - to read it from standard input.

    The tables are requests, attempts, events, usage_by_model, usage_by_route, usage_by_key, usage_by_day and audit_log;
    "describe requests" shows columns. A result that was cut at the ledger's limit is told on standard error,
    and the exit status is 3.
    """
    if format_ == "parquet" and output is None and sys.stdout.isatty():
        raise SetupError("Parquet is not for a terminal: name a file with --output, or redirect the output")
    text = sys.stdin.read(SQL_MAX_BYTES) if query == "-" else query
    server_format = "json" if format_ == "table" else format_
    answer = ask(find_ledger(home, ledger_url), text, format_=server_format)
    if format_ == "table" and output is None:
        _print_table(table_of(answer))
    else:
        _write(answer, format_, output)
    if answer.truncated:
        click.echo("penstock: this is not all: the result was cut at the ledger's limit of rows or bytes", err=True)
        sys.exit(EXIT_TRUNCATED)


@click.command(epilog="Example: penstock explain chatcmpl-0193e5c2a1b07f3e9c4d5e6f708192a3")
@click.argument("request_id")
@click.option("--json", "as_json_", is_flag=True, help="For programs, with the events as they are stored.")
@click.option("--home", help="The folder of the running `penstock up`.")
@click.option(
    "--ledger-url", help="A ledger elsewhere, with the key in PENSTOCK_API_KEY. Default: PENSTOCK_LEDGER_URL."
)
def explain(request_id: str, *, as_json_: bool, home: str | None, ledger_url: str | None) -> None:
    """Tell the whole life of a request, in order and with times.

    REQUEST_ID is a completion's id (chatcmpl-…), the x-request-id of an answer, or a request_id of the ledger.
    """
    from ledger.explain import EVENTS_OF_REQUEST, as_json, tell  # noqa: PLC0415
    from schemas.upcasters import read_event  # noqa: PLC0415

    try:
        id_ = request_id_of(request_id)
    except ValueError as error:
        raise SetupError(str(error)) from error
    table = table_of(ask(find_ledger(home, ledger_url), EVENTS_OF_REQUEST, params=[id_]))
    payloads = [row[-1].encode() for row in table.rows]
    if not payloads:
        raise SetupError(
            f"the ledger has no event of the request {id_}. One that is seconds old may still be on its way."
        )
    life = tell(id_, [read_event(payload) for payload in payloads])
    if as_json_:
        events = [msgspec.Raw(payload) for payload in payloads]
        click.echo(msgspec.json.format(msgspec.json.encode(as_json(life, events)), indent=2))
    else:
        _print_life(id_, life)


def _write(answer: Answer, format_: str, output: Path | None) -> None:
    if format_ == "table":
        lines = _plain_lines(table_of(answer))
        content = "".join(f"{line}\n" for line in lines).encode()
    else:
        content = answer.body + (b"\n" if format_ == "json" else b"")
    if output is None:
        sys.stdout.buffer.write(content)
        return
    try:
        output.write_bytes(content)
    except OSError as error:
        raise SetupError(f"{output} can't be written: {error.strerror}") from error


def _print_table(table: Table) -> None:
    """A drawn table on a terminal; otherwise aligned text, nothing cut."""
    if not sys.stdout.isatty():
        for line in _plain_lines(table):
            click.echo(line)
        return
    import rich.box  # noqa: PLC0415 - 50 ms that a pipe needn't wait for
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table as Drawn  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = Drawn(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        drawn.add_column(Text(column.name), justify="right" if _is_number(column.type) else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text("NULL", style="dim") if cell is None else Text(_cell(cell)) for cell in row))
    console = Console()
    console.print(drawn)
    console.print(_count(table.row_count), style="dim")


def _plain_lines(table: Table) -> list[str]:
    cells = [[column.name for column in table.columns]]
    cells += [["NULL" if cell is None else _cell(cell) for cell in row] for row in table.rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(table.columns))]
    right = [_is_number(column.type) for column in table.columns]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


def _print_life(id_: RequestId, life: Life) -> None:
    from ledger.explain import clock  # noqa: PLC0415

    click.echo(f"{id_}: {life.summary}")
    for moment in life.moments:
        click.echo(f"  {clock(moment.ts_ns)}  {moment.offset_ms:+10.1f} ms  {moment.text}")


def _cell(cell: object) -> str:
    match cell:
        case str():
            return cell.replace("\n", "\\n").replace("\r", "\\r").replace("\x1b", "\\x1b")
        case bool():
            return "true" if cell else "false"
        case int() | float():
            return str(cell)
        case _:
            return msgspec.json.encode(cell).decode()


def _is_number(type_: str) -> bool:
    return NUMBERS.match(type_) is not None and not type_.endswith("]")


def _count(rows: int) -> str:
    return f"{rows} row" if rows == 1 else f"{rows} rows"
