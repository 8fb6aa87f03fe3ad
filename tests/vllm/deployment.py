"""`penstock up` as its users start it, with one route: the engine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.vllm.engine import (
    ENVIRONMENT,
    HERE,
    MODEL,
    ON_CPU_ONLY,
    SERVE_OPTIONS,
    SLOTS,
    Engine,
    tiny_model_folder,
)
from tests.vllm.guarded import GuardedProcess, guarded

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 45.0  # longer than its drain
SAID_BY_THE_WORKER = ("--served-model-name", "--max-num-seqs")
SQL_TIMEOUT_S = 30.0

CONFIG = """\
[[routes]]
id = "tiny"
provider = "vllm"
base_url = "{base_url}/v1"
max_concurrency = {slots}

[[routes.models]]
name = "{model}"
price = {{ input = 0.10, output = 0.40 }}
"""
INPUT_PICO, OUTPUT_PICO = 100_000, 400_000  # the same prices, in pico-dollars a token


@dataclass(frozen=True, kw_only=True)
class Deployment:
    base_url: str  # ends in /v1
    api_key: str
    admin_key: str
    ledger_url: str
    process: GuardedProcess
    worker_pid: int
    home: Path

    def sql(self, statement: str, *params: Any) -> list[dict[str, Any]]:
        """The rows that the ledger gives for *statement*."""
        body = {"sql": statement, "params": list(params), "format": "json"}
        request = urllib.request.Request(
            f"{self.ledger_url}/v1/sql",
            data=json.dumps(body).encode(),
            headers={"authorization": f"Bearer {self.admin_key}", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=SQL_TIMEOUT_S) as response:
            result = json.load(response)
        names = [column["name"] for column in result["columns"]]
        return [dict(zip(names, row, strict=True)) for row in result["rows"]]

    def routes(self) -> dict[str, dict[str, Any]]:
        """What `penstock routes` shows, by route."""
        request = urllib.request.Request(
            f"{self.base_url.removesuffix('/v1')}/admin/v1/routes",
            headers={"authorization": f"Bearer {self.admin_key}"},
        )
        with urllib.request.urlopen(request, timeout=SQL_TIMEOUT_S) as response:
            return {row["route"]: row for row in json.load(response)["data"]}

    def request(self, request_id: str) -> dict[str, Any]:
        """The ledger's one row for *request_id*. Raises: LookupError until the request is over."""
        rows = self.sql("SELECT * FROM requests WHERE request_id = ?", request_id)
        assert len(rows) <= 1
        if not rows or rows[0]["status"] == "open":
            raise LookupError(request_id)
        return rows[0]


@contextlib.contextmanager
def penstock_up(engine: Engine, folder: Path) -> Iterator[Deployment]:
    with penstock_with(CONFIG.format(base_url=engine.base_url, slots=SLOTS, model=MODEL), folder) as deployment:
        yield deployment


@contextlib.contextmanager
def penstock_with(toml: str, folder: Path) -> Iterator[Deployment]:
    config, ready_file = folder / "penstock.toml", folder / "ready.json"
    config.write_text(toml)
    command = (
        *(sys.executable, "-m", "penstock", "up"),
        *("--home", str(folder / "home")),
        *("--port", "0"),
        *("--ready-file", str(ready_file)),
        *("--config", str(config)),
    )
    with guarded(
        command, env=plain_environment(), log_path=folder / "penstock.log", stop_within_s=STOP_TIMEOUT_S
    ) as up:
        up.wait_until_ready(ready_file.exists, timeout_s=START_TIMEOUT_S)
        ready = json.loads(ready_file.read_bytes())
        yield Deployment(
            base_url=ready["base_url"],
            api_key=ready["api_key"],
            admin_key=ready["admin_key"],
            ledger_url=ready["ledger_url"],
            process=up,
            worker_pid=ready["pids"]["worker"],
            home=Path(ready["home"]),
        )


def own_engine(*flags: str, environ: Mapping[str, str] | None = None, **members: Any) -> str:
    """The configuration of a worker that runs the tiny model itself. *members* are further ones of the route."""
    options = own_flags()
    command = [sys.executable, str(HERE / "vllm_cli.py")]
    further = "".join(f"{name} = {json.dumps(value)}\n" for name, value in members.items())
    told = {
        name: value for name, value in ENVIRONMENT.items() if name not in ON_CPU_ONLY
    }  # the rest is the worker's own
    variables = "".join(f"{name} = {json.dumps(value)}\n" for name, value in {**told, **(environ or {})}.items())
    return f"""\
[[routes]]
id = "own"
provider = "vllm"
{further}\
[[routes.models]]
name = "{MODEL}"
[routes.vllm]
model = {json.dumps(str(tiny_model_folder()))}
command = {json.dumps(command)}
args = {json.dumps([*options, *flags])}
[routes.vllm.environ]
{variables}"""


def own_flags() -> list[str]:
    """The tests' flags for the engine, less those that a worker says."""
    options = list(SERVE_OPTIONS)
    for name in SAID_BY_THE_WORKER:
        at = options.index(name)
        del options[at : at + 2]
    return options


def engine_processes(deployment: Deployment) -> list[psutil.Process]:
    """The engine's own: the guard stays to tell of its end."""
    worker = psutil.Process(deployment.worker_pid)
    return [p for p in worker.children(recursive=True) if "guard.py" not in " ".join(p.cmdline())]


def plain_environment() -> dict[str, str]:
    """The environment without settings of a Penstock or keys of providers that the developer may have there."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_") and not k.endswith("_API_KEY")}
