"""The embedded server: where it listens, what it keeps, who may have its directory, and that it goes with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bus.connection import connect
from bus.server import EmbeddedServer, find_binary
from schemas.errors import SetupError
from tests.restarts import is_gone, kill
from tests.waiting import eventually

PARENT = """
import asyncio, sys
from pathlib import Path
from bus.server import EmbeddedServer

async def main():
    server = EmbeddedServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_it_listens_on_loopback_alone_on_a_port_that_the_system_chose(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "a") as one, EmbeddedServer(tmp_path / "b") as other:
        assert one.url != other.url
        assert {at.laddr.ip for at in psutil.Process(one.pid).net_connections("tcp")} == {"127.0.0.1"}


async def test_it_comes_back_on_the_same_port_with_the_same_password(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "nats") as server:
        url, first = server.url, server.pid
        await kill(server)
        await server.start()
        assert server.url == url
        assert server.pid != first
        await (await connect(url, name="test")).close()
    await server.start()
    assert server.url == url
    await server.stop()


async def test_the_next_one_in_the_directory_is_where_the_last_one_was_unless_somebody_else_is(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "nats") as server:
        url = server.url
    async with EmbeddedServer(tmp_path / "nats") as server:
        assert server.url == url
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        other.listen()
        async with EmbeddedServer(tmp_path / "nats") as server:
            assert server.url != url
            await (await connect(server.url, name="test")).close()
    (tmp_path / "nats" / "port").write_text("no port")
    async with EmbeddedServer(tmp_path / "nats") as server:
        await (await connect(server.url, name="test")).close()


async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    parent, pid = await _parent(tmp_path / "nats")
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    await eventually(lambda: is_gone(pid), what="the server's end")


async def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "nats") as owner:
        second = EmbeddedServer(tmp_path / "nats")
        with pytest.raises(SetupError, match=r"in use by another penstock.*--home"):
            await second.start()
        assert owner.exit_code() is None
        await (await connect(owner.url, name="test")).close()
    async with second:
        assert second.exit_code() is None


async def test_a_directory_stays_taken_until_a_killed_parents_server_is_gone(tmp_path: Path) -> None:
    """Its server takes a moment to stop. One started again at once would write to the same store beside it."""
    parent, pid = await _parent(tmp_path / "nats")
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    heir = EmbeddedServer(tmp_path / "nats")
    with pytest.raises(SetupError, match="in use"):
        await heir.start()
    waiting = asyncio.create_task(heir.start())
    os.kill(pid, signal.SIGCONT)
    await waiting
    assert is_gone(pid)
    await heir.stop()


async def test_a_server_that_does_not_start_says_why_and_gives_its_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _script(
        tmp_path / "broken", 'test "$1" = --version && echo "nats-server: v2.15.1" || { echo no luck; exit 3; }'
    )
    monkeypatch.setenv("NATS_SERVER", str(broken))
    with pytest.raises(SetupError, match=r"stopped at once.*no luck"):
        await EmbeddedServer(tmp_path / "nats").start()
    monkeypatch.delenv("NATS_SERVER")
    async with EmbeddedServer(tmp_path / "nats"):
        pass


@pytest.mark.parametrize("version", ["nats-server: v2.14.6", "nats-server: v1.99.0", "something else"])
async def test_it_refuses_a_server_that_is_too_old(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATS_SERVER", str(_script(tmp_path / "old", f'echo "{version}"')))
    with pytest.raises(SetupError, match=rf"{version}; 2\.15 or newer is needed"):
        await EmbeddedServer(tmp_path / "nats").start()


@pytest.mark.parametrize("version", ["2.15.0", "2.16.3", "3.0.0"])
def test_it_takes_a_newer_server(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = _script(tmp_path / "new", f'echo "nats-server: v{version}"')
    monkeypatch.setenv("NATS_SERVER", str(script))
    assert find_binary() == str(script)


def test_it_says_so_when_the_server_can_not_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATS_SERVER", str(tmp_path / "nothing"))
    with pytest.raises(SetupError, match="can't be run"):
        find_binary()


async def test_nobody_connects_without_the_password(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "nats") as server:
        address = server.url.rpartition("@")[2]
        for url in (f"nats://{address}", f"nats://penstock:guess@{address}"):
            with pytest.raises(SetupError, match="Authorization"):
                await connect(url, name="test", wait_s=0.3)


async def test_its_secrets_are_for_its_owner_alone(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "nats"):
        assert _mode(tmp_path / "nats") == 0o700
        for name in ("nats.conf", "password", "lock"):
            assert _mode(tmp_path / "nats" / name) == 0o600, name


@pytest.mark.parametrize("name", ["with space", 'a "quote"', "back\\slash", "ünïcode", "$HOME", "#hash", "brace}"])
async def test_its_directory_may_have_any_name(name: str, tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / name):
        assert (tmp_path / name / "jetstream").is_dir()


async def test_a_cancelled_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = _script(tmp_path / "slow", f'test "$1" = --version || sleep 0.5; exec {find_binary()} "$@"')
    monkeypatch.setenv("NATS_SERVER", str(slow))
    for _ in range(5):  # on a busy machine even this one may be there before we are
        server = EmbeddedServer(tmp_path / "nats")
        starting = asyncio.create_task(server.start())
        await eventually(lambda server=server: server._process is not None, what="the child", every_s=0)
        pid = server.pid
        starting.cancel()
        await asyncio.wait([starting])
        if starting.cancelled():
            break
        await server.stop()
    assert starting.cancelled()
    assert is_gone(pid)
    monkeypatch.delenv("NATS_SERVER")
    async with EmbeddedServer(tmp_path / "nats"):
        pass


async def _parent(store: Path) -> tuple[subprocess.Popen[str], int]:
    parent = subprocess.Popen(  # noqa: ASYNC220 - a fork takes a millisecond
        [sys.executable, "-c", PARENT, str(store)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    parent.stdout.close()
    return parent, pid


def _script(path: Path, line: str) -> Path:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
