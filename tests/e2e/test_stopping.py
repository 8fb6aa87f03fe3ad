"""SIGTERM finishes what runs, loses nothing, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.asking import ask, read, row
from tests.e2e.deployment import Deployment, Provider, penstock_up
from tests.waiting import eventually

WORDS = 60

pytestmark = pytest.mark.timeout(60)


async def test_a_stream_that_runs_when_it_is_stopped_is_finished_and_told_after_the_next_start(
    provider: Provider, tmp_path: Path
) -> None:
    provider.script(tokens=WORDS, pace_s=0.01)
    with penstock_up(tmp_path, provider) as up:
        pids = up.ready()["pids"]
        assert set(pids) == {"up", "nats", "ingress", "worker", "ledger"}
        async with up.sdk() as client:
            streaming = asyncio.create_task(read(client))
            asking = asyncio.create_task(ask(client))
            await eventually(lambda: provider.answering() == 2)
            up.process.send_signal(signal.SIGTERM)
            stream, whole = await asyncio.gather(streaming, asking)
        assert await asyncio.to_thread(up.process.wait, 20) == 0
        for heard in (stream, whole):
            assert heard.code is None
            assert heard.text == " ".join(f"w{number}" for number in range(WORDS))
        _assert_gone(up, pids)
        assert up.complaints() == []
    provider.script()
    with penstock_up(tmp_path, provider) as again:
        assert again.ready()["api_key"] == json.loads((again.home / "keys.json").read_bytes())["api_key"]
        for heard in (stream, whole):
            told = await row(again, heard.request_id)
            assert (told["status"], told["completion_tokens"]) == ("completed", WORDS)
        async with again.sdk() as client:
            assert (await ask(client)).code is None
        assert again.complaints() == []


def _assert_gone(up: Deployment, pids: dict[str, int]) -> None:
    assert not up.ready_file.exists()
    assert not (up.home / "ready.json").exists()
    for pid in pids.values():
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_what_does_not_end_in_time_is_told_so_and_everything_still_ends(
    provider: Provider, tmp_path: Path
) -> None:
    """The ingress waits for drain_s and no longer; its client gets an error that it can act on."""
    provider.script(tokens=100_000, pace_s=0.01)
    settings = {"PENSTOCK_INGRESS_DRAIN_S": "1", "PENSTOCK_WORKER_DRAIN_S": "1"}
    with penstock_up(tmp_path, provider, settings=settings) as up:
        pids = up.ready()["pids"]
        async with up.sdk() as client:
            streaming = asyncio.create_task(read(client))
            asking = asyncio.create_task(ask(client))
            await eventually(lambda: provider.answering() == 2)
            port = int(up.base_url.split(":")[2].split("/")[0])
            up.process.send_signal(signal.SIGTERM)
            heard = await asyncio.gather(streaming, asking)
        assert [each.code for each in heard] == ["stopping", "stopping"]
        assert heard[1].status == 503
        assert await asyncio.to_thread(up.process.wait, 20) == 0
        _assert_gone(up, pids)
        (complaint,) = up.complaints()
        assert "Cancel 2 running task(s)" in complaint
        with contextlib.closing(socket.socket()) as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
        await eventually(lambda: provider.answering() == 0)
    with penstock_up(tmp_path, provider) as again:
        for each in heard:
            told = await row(again, each.request_id)
            assert (told["status"], told["code"]) == ("failed", "stopping")


async def test_whoever_read_the_log_may_leave_and_nothing_is_left_behind(provider: Provider, tmp_path: Path) -> None:
    """As with `make up 2>&1 | head`: from then on each line that somebody writes has no reader."""
    log, sink = os.pipe()
    with os.fdopen(sink, "wb") as written, penstock_up(tmp_path, provider, output=written) as up:
        pids = up.ready()["pids"]
        os.close(log)
        os.kill(pids["worker"], signal.SIGKILL)
        await eventually(lambda: up.ready()["pids"]["worker"] != pids["worker"], timeout_s=20)
        async with up.sdk() as client:
            await eventually(lambda: answered(client), timeout_s=20)
        pids |= up.ready()["pids"]
        up.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(up.process.wait, 20) == 0
        _assert_gone(up, pids)


async def answered(client: openai.AsyncOpenAI) -> bool:
    return (await ask(client)).code is None
