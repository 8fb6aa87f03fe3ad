"""The entrants of the benchmark: how each is started in front of the provider, waited for, and stopped by process id.

`direct` is the provider itself, the ceiling of the rig. `litellm` is LiteLLM's proxy from its package, set up to be fast: one
worker, no database, no callbacks, errors only in its log. `penstock` is `penstock up` with everything on: keys, durable
events, the ledger writing; one ingress process and one worker process.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import msgspec

from bench.provider import MODEL, Stats
from schemas.local import Ready

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0  # LiteLLM imports for many seconds on a busy machine
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1
LOG_TAIL_BYTES = 4000
PRICE = {"input": 0.15, "cached_input": 0.075, "output": 0.60}  # US dollars per million tokens
MAX_CONCURRENCY = 256


class StartError(Exception):
    """An entrant did not come up. The message has the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Where an entrant's own account of its work can be asked for in SQL."""

    url: str
    api_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    base_url: str
    api_key: str
    pids: Callable[[], Mapping[str, list[int]]]  # by role; asked for anew each time, for processes may be replaced
    log: Path | None = None
    ledger: Ledger | None = None


@contextlib.contextmanager
def provider(*, chunks: int = 16) -> Iterator[Peer]:
    """The mock provider as a process of its own."""
    command = [sys.executable, "-m", "bench.provider", "--chunks", str(chunks), "--until-eof"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise StartError("the provider printed no URL")
            yield Peer(name="direct", base_url=url, api_key="none", pids=lambda: {"provider": [process.pid]})
        finally:
            process.stdin.close()
            stop(process)


def provider_stats(peer: Peer) -> Stats:
    return msgspec.json.decode(fetch(peer.base_url.removesuffix("/v1") + "/stats"), type=Stats)


@contextlib.contextmanager
def litellm(upstream: str, home: Path) -> Iterator[Peer]:
    """LiteLLM's proxy, one worker, from the environment that `tools/bench-env` makes."""
    program = ROOT / ".venv-bench" / "bin" / "litellm"
    if not program.exists():
        raise StartError("LiteLLM is not installed: run tools/bench-env first")
    home.mkdir(parents=True, exist_ok=True)
    key, port = "sk-" + secrets.token_hex(16), free_port()
    config = home / "litellm.yaml"
    config.write_text(LITELLM_CONFIG.format(model=MODEL, upstream=upstream))
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    environment = bare_environment() | LITELLM_ENVIRONMENT | {"LITELLM_MASTER_KEY": key}
    base_url = f"http://127.0.0.1:{port}/v1"
    with running(command, environment, home / "litellm.log") as process:
        wait_until(lambda: answers(f"{base_url}/models", key), process, home / "litellm.log")
        yield Peer(
            name="litellm",
            base_url=base_url,
            api_key=key,
            pids=lambda: {"proxy": [process.pid]},
            log=home / "litellm.log",
        )


LITELLM_CONFIG = """\
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: {upstream}
      api_key: none
litellm_settings:
  telemetry: false
  set_verbose: false
  json_logs: false
  request_timeout: 60
general_settings:
  master_key: os.environ/LITELLM_MASTER_KEY
  disable_spend_logs: true
  disable_error_logs: true
  background_health_checks: false
"""
LITELLM_ENVIRONMENT = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_TELEMETRY": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # fetches nothing at start
    "DISABLE_ADMIN_UI": "True",
    "NO_DOCS": "True",
}


@contextlib.contextmanager
def penstock(upstream: str, home: Path, *, provider: str = "openai", model: str = MODEL) -> Iterator[Peer]:
    """`penstock up` with one route to the provider; everything on, nothing tuned."""
    home.mkdir(parents=True, exist_ok=True)
    config, ready = home / "penstock.toml", home / "ready.json"
    config.write_text(
        PENSTOCK_CONFIG.format(provider=provider, model=model, upstream=upstream, slots=MAX_CONCURRENCY, **PRICE)
    )
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "penstock", "up", "--home", str(home / "home"), "--port", "0"]
    command += ["--config", str(config), "--ready-file", str(ready)]
    environment = bare_environment() | {"BENCH_UPSTREAM_KEY": "none"}
    with running(command, environment, home / "penstock.log") as process:
        wait_until(lambda: read_ready(ready) is not None, process, home / "penstock.log")
        said = read_ready(ready)
        assert said is not None
        wait_until(lambda: answers(f"{said.base_url}/models/{model}", said.api_key), process, home / "penstock.log")
        yield Peer(
            name="penstock",
            base_url=said.base_url,
            api_key=said.api_key,
            pids=lambda: {"up": [process.pid]} | pids_by_role(read_ready(ready) or said),
            log=home / "penstock.log",
            ledger=Ledger(url=said.ledger_url, api_key=said.admin_key),
        )


PENSTOCK_CONFIG = """\
[[routes]]
id = "bench"
provider = "{provider}"
base_url = "{upstream}"
api_keys = ["env:BENCH_UPSTREAM_KEY"]
max_concurrency = {slots}
[[routes.models]]
name = "{model}"
price = {{ input = {input}, cached_input = {cached_input}, output = {output} }}
"""


def read_ready(path: Path) -> Ready | None:
    """The ready file, or None while there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Ready)
    except FileNotFoundError:
        return None


def pids_by_role(ready: Ready) -> dict[str, list[int]]:
    return {role: [pid] for role, pid in ready.pids.items()}


@contextlib.contextmanager
def running(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is stopped by its process id when the block ends."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if process.poll() is not None:
            raise StartError(f"{log.stem} ended with {process.returncode}:\n{tail(log)}")
        if time.monotonic() > deadline_s:
            raise StartError(f"{log.stem} was not ready within {START_TIMEOUT_S:.0f} s:\n{tail(log)}")
        time.sleep(POLL_S)


def answers(url: str, api_key: str) -> bool:
    try:
        fetch(url, api_key=api_key)
    except (HTTPError, URLError, ConnectionError, TimeoutError):
        return False
    return True


def fetch(url: str, *, api_key: str = "", body: bytes | None = None, timeout_s: float = 10.0) -> bytes:
    """GET *url*, or POST *body* to it as JSON. Raises HTTPError for a status that is not 2xx, URLError for no answer."""
    headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
    with urlopen(Request(url, data=body, headers=headers), timeout=timeout_s) as response:
        return bytes(response.read())


def bare_environment() -> dict[str, str]:
    """The environment less what could change an entrant's behaviour: proxies, provider keys, its own settings."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(path: Path) -> str:
    return path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
