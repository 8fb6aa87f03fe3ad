"""A worker beside a running `penstock up`: it needs no address, and is back when that was started anew."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.discover.test_up import ROOT, up
from tests.ports import free_port
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)

CONFIG = """\
[[routes]]
id = "beside"
provider = "echo"

[[routes.models]]
name = "mine"
"""


@contextlib.contextmanager
def worker_beside(home: Path, config: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "penstock", "worker", "--home", str(home), "--config", str(config)]
    environ = {name: value for name, value in os.environ.items() if name != "PENSTOCK_NATS"}
    with subprocess.Popen([*command, "--route", "beside"], cwd=ROOT, env=environ) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


async def test_a_worker_beside_it_is_found_and_is_back_when_it_was_started_anew(tmp_path: Path) -> None:
    config = tmp_path / "beside.toml"
    config.write_text(CONFIG)
    with contextlib.ExitStack() as stack:
        with up(tmp_path, port=free_port(), addresses=[]) as running:
            process = stack.enter_context(worker_beside(running.home, config))
            await eventually(lambda: "mine" in running.models(), timeout_s=20, every_s=0.2, what="its model")
        with up(tmp_path, port=free_port(), addresses=[]) as running:
            await eventually(lambda: "mine" in running.models(), timeout_s=20, every_s=0.2, what="its model, again")
            with running.client() as client:
                answer = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "Hello"}])
            assert answer.choices[0].message.content
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
