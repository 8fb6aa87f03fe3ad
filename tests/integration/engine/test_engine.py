"""A child of the worker: its start, its crash, its end."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
from pathlib import Path

import psutil
import pytest
import uvloop

from schemas.errors import ProviderUnreachable
from tests.integration.engine.conftest import FAKE, Make, processes_of, runs
from tests.waiting import eventually
from workers.engine.engine import SOCKET_PATH_MAX_BYTES, Engine, EngineCommand, engine_files
from workers.engine.phases import Phase
from workers.providers.vllm import _Health

SAYINGS = ("Time spent downloading weights", "Starting to load model m", "Capturing CUDA graphs")


async def test_an_engine_tells_each_phase_of_its_start_and_then_that_it_is_ready(make: Make) -> None:
    rig = make(*(word for line in SAYINGS for word in ("--fake-say", line)), "--fake-start-s", "0.2")
    await rig.started()
    assert rig.told[-1] is None
    assert list(dict.fromkeys(rig.told)) == [
        "the engine is starting",
        "the engine is downloading",
        "the engine is loading",
        "the engine is compiling",
        None,
    ]
    assert rig.engine.phase is Phase.READY


async def test_a_start_that_is_slow_is_not_ready_before_it_answers(make: Make) -> None:
    rig = make("--fake-start-s", "0.3")
    rig.start()
    await eventually(rig.command.log_file.exists, what="it runs")
    assert not rig.engine.is_ready
    await rig.ready()


async def test_a_crash_is_told_at_once_and_the_engine_started_again(make: Make) -> None:
    rig = make()
    await rig.started()
    rig.told.clear()
    (server,) = [process for process in rig.processes() if "guard.py" not in " ".join(process.cmdline())]
    server.kill()
    await eventually(lambda: rig.told, timeout_s=1.0, what="word of the crash")
    assert rig.told[0] == "the engine stopped; it is started again in 0.05 s"
    await rig.ready()
    assert rig.told[-1] is None


async def test_what_a_crashed_engine_leaves_behind_is_killed_before_the_next_starts(make: Make) -> None:
    """VLLM's engine process outlives its front end, and the GPU's memory with it."""
    rig = make("--fake-child")
    await rig.started()
    before = rig.processes()
    assert len(before) == 3
    next(p for p in before if FAKE.name in " ".join(p.cmdline()) and "guard.py" not in " ".join(p.cmdline())).kill()
    await eventually(lambda: not any(runs(process) for process in before), what="the end of all three")
    await rig.ready()


async def test_a_guard_that_is_killed_takes_its_engine_with_it(make: Make) -> None:
    rig = make("--fake-child")
    await rig.started()
    before = rig.processes()
    assert rig.engine.pid is not None
    psutil.Process(rig.engine.pid).kill()
    await eventually(lambda: not any(runs(process) for process in before), what="the end of all three")
    await rig.ready()


async def test_an_engine_that_never_comes_up_is_tried_again_ever_more_slowly(make: Make, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    rig = make("--fake-gate", str(gate))
    rig.start()
    await eventually(lambda: any("0.1 s" in (word or "") for word in rig.told), what="a second failure")
    stops = [word for word in rig.told if word is not None and "stopped" in word]
    assert stops[:2] == [f"the engine stopped; it is started again in {wait} s" for wait in ("0.05", "0.1")]
    gate.unlink()
    await rig.ready()


async def test_an_end_that_can_be_mended_says_how(make: Make, tmp_path: Path) -> None:
    """And only that life's end: what the one before said is no reason any more."""
    gate = tmp_path / "gate"
    gate.touch()
    rig = make("--fake-say", "torch.OutOfMemoryError: CUDA out of memory.", "--fake-gate", str(gate))
    rig.start()
    await eventually(lambda: any("doesn't fit" in (word or "") for word in rig.told), timeout_s=10, what="an advice")
    gate.unlink()
    await rig.ready()


async def test_a_start_over_its_limit_is_ended_and_tried_again(make: Make) -> None:
    rig = make("--fake-stuck", "--fake-child", start_timeout_s=5.0)
    rig.start()
    await eventually(lambda: len(rig.processes()) == 3, timeout_s=10, what="it runs")
    before = rig.processes()
    await eventually(lambda: rig.engine.phase is Phase.FAILED, timeout_s=10, what="it is given up")
    # All of them are killed by now and have closed what they had open; the kernel may have their names a moment longer.
    await eventually(lambda: not any(runs(process) for process in before), timeout_s=0.5, what="the end of all three")


async def test_a_socket_that_was_left_behind_is_no_hindrance(make: Make) -> None:
    rig = make()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(rig.command.socket))
    assert rig.command.socket.exists()
    await rig.started()


async def test_an_unloaded_engine_is_loaded_by_the_job_that_needs_it(make: Make) -> None:
    """It counts as able to serve all the while: nobody hears of its unloading or its loading."""
    rig = make()
    await rig.started()
    rig.told.clear()
    await rig.engine.unload()
    await eventually(lambda: rig.engine.phase is Phase.STOPPED and not rig.processes(), what="it is unloaded")
    await asyncio.gather(*(rig.engine.need() for _ in range(3)))
    assert rig.engine.is_ready
    assert set(rig.told) == {None}


async def test_a_job_that_comes_while_the_engine_unloads_has_it_loaded_again(make: Make) -> None:
    rig = make()
    await rig.started()
    rig.told.clear()
    unloading = asyncio.create_task(rig.engine.unload())
    await asyncio.sleep(0)  # it has begun
    assert not rig.engine.is_ready
    await rig.engine.need()
    await unloading
    assert rig.engine.is_ready
    assert set(rig.told) == {None}, "it is no crash"


async def test_a_load_that_fails_faults_the_job_that_waits_for_it(make: Make, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    rig = make("--fake-gate", str(gate))
    await rig.started()
    await rig.engine.unload()
    gate.touch()
    with pytest.raises(ProviderUnreachable):
        await rig.engine.need()
    assert rig.told[-1] == "the engine stopped; it is started again in 0.05 s"
    gate.unlink()
    await rig.ready()


async def test_closing_ends_an_engine_whatever_it_is_doing(make: Make) -> None:
    rig = make("--fake-start-s", "60")
    rig.start()
    await eventually(lambda: len(rig.processes()) == 2, what="it runs")
    waiting = asyncio.create_task(rig.engine.need())
    await asyncio.sleep(0)
    await rig.engine.aclose()
    assert rig.processes() == []
    with pytest.raises(ProviderUnreachable):
        await waiting


async def test_an_engine_closed_while_it_unloads_leaves_nothing(make: Make) -> None:
    rig = make("--fake-child")
    await rig.started()
    unloading = asyncio.create_task(rig.engine.unload())
    await asyncio.sleep(0)
    unloading.cancel()
    await rig.engine.aclose()
    await asyncio.gather(unloading, return_exceptions=True)
    assert rig.processes() == []


async def test_the_log_is_kept_and_bounded(make: Make, tmp_path: Path) -> None:
    rig = make("--fake-flood", "300000", "--max-model-len=8192", log_max_bytes=100_000)
    await rig.started()
    sizes = [(tmp_path / name).stat().st_size for name in ("e.log", "e.old")]
    assert max(sizes) <= 100_000


async def test_flags_of_the_operators_reach_the_engine(make: Make) -> None:
    rig = make("--max-model-len=8192", "--enforce-eager")
    await rig.started()
    assert rig.command.log_file.read_text().splitlines()[0] == "flags serve m --max-model-len=8192 --enforce-eager"


OWNER = """\
import asyncio, sys
from pathlib import Path
from workers.engine.engine import SOCKET_PATH_MAX_BYTES, Engine, EngineCommand, engine_files

async def healthy():
    return False

async def main():
    folder = Path(sys.argv[1])
    argv = (sys.executable, sys.argv[2], "serve", "m", "--uds", str(folder / "e.sock"), "--fake-child", "--fake-deaf")
    command = EngineCommand(name="e", argv=argv, socket=folder / "e.sock", log_file=folder / "e.log")
    Engine(command, healthy=healthy, start_timeout_s=60.0).attach(lambda _: None)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_owner_leaves_no_process_of_its_engine(make: Make, tmp_path: Path) -> None:
    rig = make()  # never started: its names only
    root = Path(__file__).parents[3]
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(tmp_path), str(FAKE), cwd=root, stdout=asyncio.subprocess.DEVNULL
    )
    await eventually(rig.command.socket.exists, timeout_s=10, what="the engine runs")
    started = rig.processes()
    assert len(started) == 3
    owner.kill()
    await owner.wait()
    await eventually(lambda: not any(runs(process) for process in started), what="the end of all three")


def test_an_engine_lives_on_the_loop_of_the_workers_too(tmp_path: Path) -> None:
    """Children are a matter of the loop, and workers run on uvloop: a start, a crash, a return, an unloading and the end."""

    async def live() -> None:
        socket_file = tmp_path / "e.sock"
        argv = (sys.executable, str(FAKE), "serve", "m", "--uds", str(socket_file), "--fake-child")
        command = EngineCommand(name="e", argv=argv, socket=socket_file, log_file=tmp_path / "e.log")
        engine = Engine(command, healthy=_Health(socket_file), start_timeout_s=10.0, backoff_min_s=0.05)
        told: list[str | None] = []
        engine.attach(told.append)
        await eventually(lambda: engine.is_ready, timeout_s=10, what="it is ready")
        before = processes_of(socket_file)
        next(p for p in before if "guard.py" not in " ".join(p.cmdline())).kill()
        await eventually(lambda: not any(runs(process) for process in before), what="the end of all three")
        stopped = "the engine stopped; it is started again in 0.05 s"
        await eventually(lambda: stopped in told, timeout_s=10, what="it is told")
        await eventually(lambda: engine.is_ready, timeout_s=10, what="it is ready again")
        await engine.unload()
        await engine.need()
        await engine.aclose()
        assert processes_of(socket_file) == []

    uvloop.run(live())


def test_an_engines_files_are_in_the_folder_that_is_named(tmp_path: Path) -> None:
    socket_file, log_file, scratch = engine_files("Qwen/Qwen3-0.6B", str(tmp_path / "run"))
    assert socket_file == tmp_path / "run" / "Qwen=2fQwen3-0.6B.sock"
    assert log_file == socket_file.with_suffix(".log")
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert scratch is None


def test_engines_of_one_folder_never_share_a_file(tmp_path: Path) -> None:
    names = ("a/b", "a-b", "a=2fb", "m" * 200, "m" * 199 + "n")
    found = [path for name in names for path in engine_files(name, str(tmp_path))[:2]]
    assert len(set(found)) == 2 * len(names)


def test_a_socket_whose_path_would_be_too_long_is_elsewhere_and_can_be_bound(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    socket_file, log_file, scratch = engine_files("m", str(deep))
    assert log_file.parent == deep
    assert len(os.fsencode(socket_file)) <= SOCKET_PATH_MAX_BYTES
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(socket_file))
    assert scratch == socket_file.parent
    shutil.rmtree(scratch)
