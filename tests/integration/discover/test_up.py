"""Through the whole system: `penstock up` without a route, servers that come and go as programs, and the openai SDK."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.ports import free_port
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[3]
APPEARS_WITHIN_S = 20.0
START_WITHIN_S = 30.0
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@dataclass
class Up:
    """A running `penstock up`; what it printed is in *log*."""

    base_url: str
    api_key: str
    home: Path
    log: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=20)

    def models(self) -> set[str]:
        with self.client() as client:
            return {model.id for model in client.models.list()}

    def routes(self) -> str:
        command = [sys.executable, "-m", "penstock", "routes", "--home", str(self.home)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout


@contextlib.contextmanager
def up(folder: Path, *, port: int, addresses: list[str]) -> Iterator[Up]:
    config, ready_file, log = folder / "penstock.toml", folder / "ready.json", folder / "log"
    config.write_text(f"[worker]\ndiscover_addresses = {json.dumps(addresses)}\n")
    command = [sys.executable, "-m", "penstock", "up", "--home", str(folder / "home"), "--port", str(port)]
    command += ["--config", str(config), "--ready-file", str(ready_file)]
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out) as process:
        try:
            until = time.monotonic() + START_WITHIN_S
            while not ready_file.exists():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            ready = json.loads(ready_file.read_bytes())
            yield Up(ready["base_url"], ready["api_key"], Path(ready["home"]), log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


@contextlib.contextmanager
def program(kind: str, *, port: int, model: str) -> Iterator[subprocess.Popen[str]]:
    """One of the servers as a program."""
    command = [sys.executable, str(ROOT / "tests/local_servers.py"), kind, "--port", str(port), "--model", model]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.fixture
def ports() -> list[int]:
    """Three that are free."""
    return [free_port() for _ in range(3)]


async def test_model_servers_come_and_go_and_are_served_meanwhile(tmp_path: Path, ports: list[int]) -> None:
    own, ollama_port, llama_port = ports
    addresses = [f"127.0.0.1:{port}" for port in (own, ollama_port, llama_port)]
    with (
        program("ollama", port=ollama_port, model="qwen3:0.6b"),
        up(tmp_path, port=own, addresses=addresses) as running,
    ):
        greeting = "ollama: qwen3:0.6b"  # it comes behind the ready file
        await eventually(lambda: greeting in running.log.read_text(), what="the greeting that says what was found")
        await eventually(lambda: running.models() == {"echo", "qwen3:0.6b"}, every_s=0.2, what="what was found")

        with program("llamacpp", port=llama_port, model="/home/ann/tiny.gguf") as llama:
            await eventually(lambda: "tiny" in running.models(), timeout_s=APPEARS_WITHIN_S, every_s=0.2)
            with running.client() as client:
                asked: list[Any] = [{"role": "user", "content": "Hello"}]
                with client.chat.completions.stream(model="tiny", messages=asked, tools=TOOLS) as stream:
                    final = stream.get_final_completion().choices[0]
                calls = final.message.tool_calls
                assert calls is not None
                (call,) = calls
                assert json.loads(call.function.arguments) == {"city": "Oslo"}
                assert final.finish_reason == "tool_calls"
                text = client.chat.completions.create(model="qwen3:0.6b", messages=asked, max_completion_tokens=2)
                assert text.choices[0].message.content == "one two "
            llama.kill()
            await eventually(lambda: "tiny" not in running.models(), timeout_s=APPEARS_WITHIN_S, every_s=0.2)

        assert running.models() == {"echo", "qwen3:0.6b"}
        rows = [line.split("\t") for line in running.routes().splitlines()]
        assert [row[0] for row in rows] == ["route", "echo", "ollama"], "and not ourselves"
        for event in ("local_server_found", "local_server_served", "local_server_gone"):
            assert event in running.log.read_text()
        assert "local_server_not_known" not in running.log.read_text(), "our own port isn't worth a word"
