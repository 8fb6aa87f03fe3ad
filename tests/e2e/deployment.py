"""`penstock up` as its users start it, and a provider beside it that keeps its own count: two programs, seen from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import openai

from tests.sdk import sdk

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
HTTP_TIMEOUT_S = 10.0
LOG_TAIL_LINES = 60

MODEL = "public/model-1"
UPSTREAM_MODEL = "upstream-model"
INPUT_PICO, CACHED_PICO, OUTPUT_PICO = 150_000, 75_000, 600_000  # the prices below, in pico-dollars a token
SLOTS = 32
CONFIG = """\
[[routes]]
id = "mock"
provider = "openai"
base_url = "{base_url}"
max_concurrency = {slots}

[[routes.models]]
name = "{model}"
upstream = "{upstream}"
price = {{ input = 0.15, cached_input = 0.075, output = 0.60 }}
"""
NOT_JSON_BUT_MEANT = "Stopping: what runs may finish. Again to stop at once."

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def http(url: str, body: object = None, *, key: str | None = None) -> Any:
    """The decoded answer to a GET, or to a POST of *body*."""
    headers = {"content-type": "application/json", **({} if key is None else {"authorization": f"Bearer {key}"})}
    data = None if body is None else json.dumps(body).encode()
    with _opener.open(urllib.request.Request(url, data=data, headers=headers), timeout=HTTP_TIMEOUT_S) as answer:
        return json.load(answer)


@dataclass(frozen=True)
class Provider:
    """The mock provider in a process of its own: the outside witness."""

    base_url: str

    def script(self, **changes: Any) -> None:
        http(self._mock("script"), changes)

    def forget(self) -> None:
        http(self._mock("forget"))

    def seen(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = http(self._mock("seen"))["requests"]
        return found

    def answering(self) -> int:
        return int(http(self._mock("seen"))["answering"])

    def _mock(self, what: str) -> str:
        return f"{self.base_url.removesuffix('/v1')}/mock/{what}"


@contextlib.contextmanager
def provider_up() -> Iterator[Provider]:
    command = [sys.executable, str(ROOT / "tests" / "mock_provider.py"), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Provider(process.stdout.readline().strip())
        finally:
            process.kill()


@dataclass(eq=False)
class Deployment:
    """A running `penstock up`. Everything is read anew from the ready file: a restart may change the pids."""

    process: subprocess.Popen[bytes]
    folder: Path
    expected: set[str] = field(default_factory=set)  # names of warnings and errors that a test provokes, or lines

    @property
    def ready_file(self) -> Path:
        return self.folder / "ready.json"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def log_file(self) -> Path:
        return self.folder / "penstock.log"

    def ready(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ready_file.read_bytes())
        return found

    def pid(self, role: str) -> int:
        return int(self.ready()["pids"][role])

    def kill(self, role: str) -> int:
        """kill -9 of the role's process, whose pid is returned."""
        pid = self.pid(role)
        os.kill(pid, signal.SIGKILL)
        return pid

    @property
    def base_url(self) -> str:
        return str(self.ready()["base_url"])

    @property
    def api_key(self) -> str:
        return str(self.ready()["api_key"])

    def sdk(self, *, key: str | None = None) -> openai.AsyncOpenAI:
        return sdk(self.base_url, key or self.api_key)

    def sql(self, statement: str, *params: Any) -> list[dict[str, Any]]:
        """The rows that POST /v1/sql gives for *statement*."""
        ready = self.ready()
        asked = {"sql": statement, "params": list(params), "format": "json"}
        result = http(f"{ready['ledger_url']}/v1/sql", asked, key=ready["admin_key"])
        names = [column["name"] for column in result["columns"]]
        return [dict(zip(names, row, strict=True)) for row in result["rows"]]

    def command(self, *arguments: str) -> str:
        """What `penstock ARGUMENTS` prints for this home."""
        at = 1 if arguments[0] == "keys" else len(arguments)  # a group has it before its command
        ran = subprocess.run(
            [sys.executable, "-m", "penstock", *arguments[:at], "--home", str(self.home), *arguments[at:]],
            cwd=ROOT,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def complaints(self) -> list[str]:
        """Lines of the log that no normal run has."""
        return [line for line in self.log().splitlines() if line and not self._is_normal(line)]

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def log_tail(self) -> str:
        lines = [line for line in self.log().splitlines() if '"sql_answered"' not in line]  # our own questions
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def _is_normal(self, line: str) -> bool:
        try:
            told = json.loads(line)
        except ValueError:
            return line == NOT_JSON_BUT_MEANT or line in self.expected
        return told["level"] in ("debug", "info") or told["event"] in self.expected


@contextlib.contextmanager
def penstock_up(
    folder: Path,
    provider: Provider,
    *,
    settings: dict[str, str] | None = None,
    config_more: str = "",
    output: IO[bytes] | None = None,
) -> Iterator[Deployment]:
    """Yields once it is ready. It dies with the test, whatever becomes of that.

    *settings* are ``PENSTOCK_*``; *config_more* comes behind the configuration. *output* gets the greeting and the log instead
    of the log file.
    """
    config = folder / "penstock.toml"
    config.write_text(
        CONFIG.format(base_url=provider.base_url, slots=SLOTS, model=MODEL, upstream=UPSTREAM_MODEL) + config_more,
        encoding="utf-8",
    )
    made = Deployment(process=None, folder=folder)  # type: ignore[arg-type]  # started in the next lines
    command = [sys.executable, "-m", "penstock", "up", "--port", "0", "--home", str(made.home)]
    with (
        made.log_file.open("ab") as log,
        subprocess.Popen(
            [*command, "--config", str(config), "--ready-file", str(made.ready_file)],
            cwd=ROOT,
            env=_environment() | (settings or {}),
            stdin=subprocess.DEVNULL,
            stdout=output or subprocess.DEVNULL,
            stderr=output or log,
        ) as process,
    ):
        made.process = process
        try:
            _wait_until_ready(made)
            yield made
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait_until_ready(made: Deployment) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while not made.ready_file.exists():
        if made.process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"`penstock up` is not ready:\n{made.log_tail()}")
        time.sleep(0.01)


def _environment() -> dict[str, str]:
    """Without what the developer may have set for a Penstock, or keys of providers that would become routes."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PENSTOCK_") and not k.endswith("_API_KEY")}
