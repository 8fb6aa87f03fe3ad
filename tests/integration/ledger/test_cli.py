"""`penstock sql` and `penstock explain` against a running ledger."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest

from ledger.cli import EXIT_TRUNCATED
from schemas.ids import RequestId, completion_id
from schemas.local import Ready, write_ready
from tests.integration.ledger.conftest import ANALYST_KEY, CLIENT_KEY, RunningLedger
from tests.unit.ledger import samples

ROOT = Path(__file__).parents[3]


class Ran(NamedTuple):
    status: int
    out: bytes
    err: str


class Shell:
    """Runs commands as a shell does, beside the ledger."""

    def __init__(self, ledger: RunningLedger) -> None:
        self._environ = {"PENSTOCK_LEDGER_URL": ledger.url, "PENSTOCK_API_KEY": ANALYST_KEY}

    async def run(self, *arguments: str, stdin: str = "", **environ: str) -> Ran:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "penstock", *arguments),
            cwd=ROOT,
            env={**os.environ, **self._environ, **environ},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Ran(process.returncode, out, err.decode())

    async def out(self, *arguments: str, stdin: str = "") -> str:
        ran = await self.run(*arguments, stdin=stdin)
        assert (ran.status, ran.err) == (0, "")
        return ran.out.decode()

    async def refused(self, *arguments: str, **environ: str) -> str:
        """What a person reads when it doesn't work: one line."""
        ran = await self.run(*arguments, **environ)
        assert (ran.status, ran.out) == (1, b"")
        assert ran.err.startswith("penstock: ")
        assert "Traceback" not in ran.err
        return ran.err


@pytest.fixture
async def shell(ledger: RunningLedger) -> Shell:
    await ledger.say(*samples.whole(1), samples.accepted(2), samples.rejected(3, key_id=None, model=None))
    return Shell(ledger)


QUERY = "select model, status, completion_tokens, cost_usd, first_token_ms from requests order by request_id"


async def test_help_has_an_example(shell: Shell) -> None:
    for command in ("sql", "explain", "ledger"):
        assert "Example: " in await shell.out(command, "--help")


async def test_a_table_lines_numbers_up_and_shows_nulls(shell: Shell) -> None:
    assert (await shell.out("sql", QUERY)).splitlines() == [
        "model  status     completion_tokens        cost_usd  first_token_ms",
        "m      completed                 10  0.000008700000             7.5",
        "m      open                    NULL            NULL            NULL",
        "NULL   rejected                   0  0.000000000000            NULL",
    ]


async def test_nothing_is_cut_where_nobody_watches(shell: Shell) -> None:
    out = await shell.out("sql", "select payload from events where kind = 'request.finished'")
    assert json.loads(out.splitlines()[1])["kind"] == "request.finished"


async def test_a_query_can_come_from_standard_input(shell: Shell) -> None:
    assert "42" in await shell.out("sql", "-", stdin="select 42 as answer -- it is\n")


async def test_csv_and_json_are_for_programs(shell: Shell) -> None:
    rows = list(csv.reader(io.StringIO(await shell.out("sql", QUERY, "--format", "csv"))))
    assert rows[1] == ["m", "completed", "10", "0.000008700000", "7.5"]
    answer = json.loads(await shell.out("sql", QUERY, "--format", "json"))
    assert answer["row_count"] == 3


async def test_parquet_goes_into_a_file_or_a_pipe(shell: Shell, tmp_path: Path) -> None:
    target = tmp_path / "requests.parquet"
    await shell.out("sql", QUERY, "--format", "parquet", "--output", str(target))
    assert pq.read_table(target).num_rows == 3
    piped = await shell.run("sql", QUERY, "--format", "parquet")
    assert pq.read_table(io.BytesIO(piped.out)).num_rows == 3


async def test_a_table_can_go_into_a_file(shell: Shell, tmp_path: Path) -> None:
    target = tmp_path / "table.txt"
    assert await shell.out("sql", QUERY, "--output", str(target)) == ""
    assert target.read_text().startswith("model  status")
    assert "can't be written" in await shell.refused("sql", QUERY, "--output", str(tmp_path / "no" / "such"))


async def test_a_cut_result_is_told_and_has_its_own_exit_status(shell: Shell) -> None:
    ran = await shell.run("sql", "from range(1000)", "--format", "csv")
    assert ran.status == EXIT_TRUNCATED
    assert "this is not all" in ran.err
    assert len(ran.out.splitlines()) == 101


@pytest.mark.parametrize(
    ("query", "message", "sql_timeout_s"),
    [
        ("select nothing from requests", 'Referenced column "nothing" not found', 10.0),
        ("delete from events", "Only queries can run here", 10.0),
        ("select count(*) from range(1000000000000)", "longer than the limit of 1 s", 1.0),
    ],
)
async def test_the_ledgers_refusal_is_the_commands_error(shell: Shell, query: str, message: str) -> None:
    assert message in await shell.refused("sql", query)


async def test_a_ledger_that_cannot_be_asked_is_explained(ledger: RunningLedger, shell: Shell, tmp_path: Path) -> None:
    for environ, message in (
        ({"PENSTOCK_API_KEY": "wrong"}, "Incorrect API key"),
        ({"PENSTOCK_API_KEY": CLIENT_KEY}, "role analyst or admin"),
        ({"PENSTOCK_API_KEY": "", "PENSTOCK_ADMIN_KEY": ""}, "set PENSTOCK_API_KEY"),
        ({"PENSTOCK_LEDGER_URL": "http://127.0.0.1:9"}, "there is no ledger at http://127.0.0.1:9"),
        ({"PENSTOCK_LEDGER_URL": "", "PENSTOCK_HOME": str(tmp_path / "none")}, "nothing is running in"),
    ):
        assert message in await shell.refused("sql", "select 1", **environ)


async def test_the_ledger_of_a_running_up_is_found_by_its_home(
    ledger: RunningLedger, shell: Shell, tmp_path: Path
) -> None:
    ready = Ready(
        base_url="http://127.0.0.1:1/v1",
        api_key="k",
        admin_key=ANALYST_KEY,
        ledger_url=ledger.url,
        nats_url="nats://x",
        home=str(tmp_path),
        pids={},
    )
    write_ready(tmp_path / "ready.json", ready)
    assert "42" in await shell.out("sql", "select 42 as answer", "--home", str(tmp_path))
    ran = await shell.run("sql", "select 42 as answer", PENSTOCK_LEDGER_URL="", PENSTOCK_HOME=str(tmp_path))
    assert b"42" in ran.out


@pytest.mark.parametrize("form", [str, completion_id, lambda id_: id_.replace("-", "").upper()])
async def test_explain_tells_the_life_of_a_request(shell: Shell, form: Callable[[RequestId], str]) -> None:
    told = await shell.out("explain", form(RequestId(samples.uuid(1))))
    lines = told.splitlines()
    assert (
        lines[0]
        == f"{samples.uuid(1)}: completed, HTTP 200, 20 prompt + 10 completion tokens (4 cached), $0.000008700000"
    )
    assert lines[1].startswith("  2026-11-20 12:00:00.100000        +0.0 ms  accepted: m, a stream")
    assert lines[4].startswith("  2026-11-20 12:00:00.145000       +45.0 ms  completed with HTTP 200")


async def test_explain_has_json_with_the_stored_events(shell: Shell) -> None:
    told = json.loads(await shell.out("explain", samples.uuid(1), "--json"))
    assert [event["kind"] for event in told["events"]] == [moment["kind"] for moment in told["moments"]]
    assert told["events"][3]["cost_pico"] == 8_700_000


@pytest.mark.parametrize(
    ("id_", "message"), [("chatcmpl-nonsense", "is not a request id"), (samples.uuid(77), "has no event")]
)
async def test_explain_says_what_it_does_not_know(shell: Shell, id_: str, message: str) -> None:
    assert message in await shell.refused("explain", id_)
