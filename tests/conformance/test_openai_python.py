"""openai-python's own tests pass against `penstock up` with the provider echo."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import suite
from tests.waiting import eventually

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 40.0
LOG_SHOWN_CHARS = 4000
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def source() -> Path:
    return suite.fetch()


@dataclass(frozen=True, slots=True)
class Running:
    process: subprocess.Popen[bytes]
    folder: Path

    def ready(self) -> dict[str, Any]:
        if self.process.poll() is not None:
            pytest.fail(self.log())
        return json.loads((self.folder / "ready.json").read_bytes())  # type: ignore[no-any-return]

    def log(self) -> str:
        return (self.folder / "up.log").read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def up(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("conformance")
    config = folder / "penstock.toml"
    models = "".join(f"[[routes.models]]\nname = {json.dumps(name)}\n" for name in suite.models_asked_for(source))
    config.write_text(f'[[routes]]\nid = "echo"\nprovider = "echo"\n{models}', encoding="utf-8")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    command = [sys.executable, "-m", "penstock", "up", "--port", "0", "--home", str(folder / "home")]
    with (
        (folder / "up.log").open("wb") as log,
        subprocess.Popen(
            [*command, "--config", str(config), "--ready-file", str(folder / "ready.json")],
            cwd=suite.ROOT,
            env={**ours, "PENSTOCK_API_KEY": suite.API_KEY},
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield Running(process, folder)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
async def base_url(up: Running) -> str:
    ready = await eventually(up.ready, timeout_s=START_TIMEOUT_S, what="`penstock up`")
    return str(ready["base_url"])


def test_the_suite_is_of_the_version_that_is_installed() -> None:
    assert suite.pinned().version == importlib.metadata.version("openai")


def test_the_models_that_the_suite_asks_for_are_found(source: Path) -> None:
    assert {"gpt-6-astra", "ft:gpt-4o-mini:acemeco:suffix:abc123"} <= set(suite.models_asked_for(source))


async def test_openai_pythons_own_tests_of_chat_and_models_pass(source: Path, up: Running, base_url: str) -> None:
    verdict = suite.run(source, base_url=base_url)
    counts = f"{verdict.failed} failed, {verdict.skipped} were skipped"
    assert verdict.is_clean, f"{counts}:\n{verdict.output}\nThe server's log ends:\n{up.log()[-LOG_SHOWN_CHARS:]}"


async def test_every_operation_of_the_document_exists(base_url: str) -> None:
    """Without a key, so that nothing is done: what needs one says 401, and what isn't there would say 404 or 405."""
    root = base_url.removesuffix("/v1")
    openapi = json.loads(OPENER.open(f"{root}/openapi.json", timeout=5).read())
    for path, item in openapi["paths"].items():
        for method in item.keys() - {"parameters"}:
            address = root + path.replace("{model}", "m").replace("{key_id}", "k")
            wanted = 200 if item[method].get("security") == [] else 401
            assert (_status(method.upper(), address), method, path) == (wanted, method, path)


async def test_nothing_of_this_was_worth_a_warning(up: Running, base_url: str) -> None:
    """Last in this file: the log of a normal run, clients that leave early included, has no warning and no error."""
    log = up.log()
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert events, log
    assert [event for event in events if event["level"] in ("warning", "error", "critical")] == []
    assert "Traceback" not in log


def _status(method: str, address: str) -> int:
    body = b"{}" if method == "POST" else None
    try:
        with OPENER.open(urllib.request.Request(address, method=method, data=body), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
