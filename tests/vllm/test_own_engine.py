"""A worker that runs vLLM itself: `provider = "vllm"` without an address."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.vllm.asking import LONG, ask, endless
from tests.vllm.conftest import require_vllm
from tests.vllm.deployment import Deployment, penstock_with
from tests.vllm.engine import ENVIRONMENT, HERE, MODEL, SERVE_OPTIONS, tiny_model_folder
from tests.vllm.tiny_model import COUNT, HELLO
from tests.waiting import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

START_TIMEOUT_S = 180.0
NOT_OURS = ("--served-model-name", "--max-num-seqs")  # the worker says these itself


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    require_vllm()
    with penstock_with(config(), tmp_path_factory.mktemp("own")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def own_client(own: Deployment) -> Iterator[OpenAI]:
    with OpenAI(base_url=own.base_url, api_key=own.api_key, max_retries=0) as client:
        yield client


def config() -> str:
    options = list(SERVE_OPTIONS)
    for name in NOT_OURS:
        at = options.index(name)
        del options[at : at + 2]
    command = json.dumps([sys.executable, str(HERE / "vllm_cli.py")])
    environ = "".join(f"{name} = {json.dumps(value)}\n" for name, value in ENVIRONMENT.items())
    return f"""\
[[routes]]
id = "own"
provider = "vllm"
max_concurrency = 8
[[routes.models]]
name = "{MODEL}"
[routes.vllm]
model = {json.dumps(str(tiny_model_folder()))}
command = {command}
args = {json.dumps(options)}
[routes.vllm.environ]
{environ}"""


async def serving(client: OpenAI) -> None:
    def answers() -> bool:
        return any(model.id == MODEL for model in client.models.list())

    await eventually(answers, timeout_s=START_TIMEOUT_S, every_s=0.2, what="the engine serves")


async def test_until_the_engine_is_ready_a_client_hears_why(own: Deployment, own_client: OpenAI) -> None:
    """The first of the module: `up` itself is there long before vLLM is."""
    with pytest.raises(openai.InternalServerError) as refused:
        own_client.chat.completions.create(**ask(HELLO))
    assert refused.value.status_code == 503
    assert "the engine is" in refused.value.message
    assert refused.value.response.headers["retry-after"]
    await serving(own_client)
    completion = own_client.chat.completions.create(**ask(HELLO))
    assert completion.choices[0].message.content == HELLO.answer


async def test_token_ids_are_counted_and_never_shown(own: Deployment, own_client: OpenAI) -> None:
    """A stream that its client leaves is billed by the ids that the engine gave: counted, not estimated by length."""
    await serving(own_client)
    seen = 0
    with own_client.chat.completions.create(**endless(COUNT, tokens=LONG), stream=True) as stream:
        request_id = stream.response.headers["x-request-id"]
        for chunk in stream:
            assert "token_ids" not in chunk.model_dump_json()
            seen += 1
            if seen == 20:
                break
    row = await eventually(lambda: own.request(request_id), what="the ledger's row")
    assert row["status"] == "cancelled"
    assert row["completion_tokens"] >= 19


async def test_an_engine_that_dies_in_a_stream_is_an_honest_error_and_comes_back(
    own: Deployment, own_client: OpenAI
) -> None:
    await serving(own_client)
    stream = own_client.chat.completions.create(**endless(HELLO, tokens=LONG), stream=True)
    next(stream)
    killed_at = time.monotonic()
    for process in engine_processes(own):
        process.kill()
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    assert time.monotonic() - killed_at < 5.0
    await eventually(
        lambda: not any(m.id == MODEL for m in own_client.models.list()), timeout_s=10.0, what="the route is down"
    )
    await serving(own_client)
    assert own_client.chat.completions.create(**ask(HELLO)).choices[0].message.content == HELLO.answer


async def test_many_streams_at_once(own: Deployment, own_client: OpenAI) -> None:
    await serving(own_client)
    async with AsyncOpenAI(base_url=own.base_url, api_key=own.api_key, max_retries=0) as client:
        streams = [await client.chat.completions.create(**ask(COUNT), stream=True) for _ in range(8)]
        texts = ["".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) for stream in streams]
    assert texts == [COUNT.answer] * 8


async def test_a_killed_worker_leaves_no_engine_behind(tmp_path: Path) -> None:
    require_vllm()
    with penstock_with(config(), tmp_path) as deployment:
        await eventually(lambda: engine_processes(deployment), timeout_s=30.0, what="an engine")
        left = engine_processes(deployment)
        psutil.Process(deployment.worker_pid).kill()
        await eventually(lambda: not any(alive(process) for process in left), timeout_s=10.0, what="the engine's end")


def engine_processes(deployment: Deployment) -> list[psutil.Process]:
    """The engine's own: the guard stays to tell of its end."""
    worker = next(
        p for p in psutil.Process(deployment.process.pid).children(recursive=True) if p.cmdline()[-1:] and is_worker(p)
    )
    return [p for p in worker.children(recursive=True) if "guard.py" not in " ".join(p.cmdline())]


def is_worker(process: psutil.Process) -> bool:
    words = process.cmdline()
    return "penstock" in words and "worker" in words


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
