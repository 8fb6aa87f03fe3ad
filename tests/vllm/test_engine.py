"""The engine and the guard by themselves: what the other tests lean on."""

from __future__ import annotations

import subprocess
import sys
import urllib.request

import psutil
import pytest
from openai import OpenAI

from tests.vllm.asking import LONG, ask, endless
from tests.vllm.engine import GENERATED, RUNNING, Engine
from tests.vllm.guarded import GUARD
from tests.vllm.tiny_model import AS_JSON, COUNT, HELLO, Conversation
from tests.waiting import eventually
from workers.providers.vllm_metrics import METRICS_PATHS, read

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.gpu,
    pytest.mark.timeout(300),
]  # the first test pays for the start of the engine


@pytest.mark.parametrize("conversation", [HELLO, COUNT, AS_JSON], ids=lambda c: c.question)
def test_engine_says_what_it_was_taught(direct: OpenAI, conversation: Conversation) -> None:
    completion = direct.chat.completions.create(**ask(conversation))
    assert completion.choices[0].message.content == conversation.answer
    assert completion.choices[0].finish_reason == "stop"


async def test_engine_counts_what_it_runs(engine: Engine, direct: OpenAI) -> None:
    """The other tests read these two metrics: how many requests run, and the tokens generated so far."""
    generated = engine.metric(GENERATED)
    with direct.chat.completions.create(**endless(HELLO, tokens=LONG), stream=True) as stream:
        next(stream)
        assert engine.metric(RUNNING) == 1
    await eventually(lambda: engine.metric(RUNNING) == 0, what="a free engine")
    assert generated < engine.metric(GENERATED) < generated + LONG


def test_the_numbers_asked_for_by_name_are_those_of_the_whole_page(engine: Engine) -> None:
    pages = [urllib.request.urlopen(engine.base_url + path, timeout=5).read().decode() for path in METRICS_PATHS]
    by_name, whole = map(read, pages)
    assert by_name is not None
    assert by_name == whole
    assert by_name.cache_tokens
    assert len(pages[0]) < len(pages[1]) / 10


async def test_guard_leaves_nothing_behind_when_its_asker_is_killed() -> None:
    """SIGKILL gives the asker no chance to clean up; the pipe it held closes all the same."""
    nap = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    ask_guard = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, {str(GUARD)!r}, sys.executable, '-c', {nap!r}], "
        "stdin=subprocess.PIPE, start_new_session=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", ask_guard]) as asker:  # noqa: ASYNC220  nothing else runs here
        children = psutil.Process(asker.pid).children
        await eventually(lambda: len(children(recursive=True)) == 3, what="guard, command and the command's child")
        started = children(recursive=True)
        asker.kill()
    await eventually(lambda: not any(runs(process) for process in started), what="the end of all three")


def runs(process: psutil.Process) -> bool:
    """Not so if it is only waiting for its parent to take note, which nobody may ever do in a container."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
