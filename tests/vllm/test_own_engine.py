"""A worker that runs vLLM itself: `provider = "vllm"` without an address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.vllm.asking import LONG, ask, endless
from tests.vllm.conftest import require_vllm
from tests.vllm.deployment import Deployment, engine_processes, own_engine, penstock_with
from tests.vllm.engine import MODEL
from tests.vllm.tiny_model import COUNT, HELLO
from tests.waiting import eventually
from workers.providers.vllm_cores import cores_without_gpu, on_few_cores

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.timeout(300)]

START_TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    require_vllm()
    with penstock_with(own_engine(max_concurrency=8), tmp_path_factory.mktemp("own")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def own_client(own: Deployment) -> Iterator[OpenAI]:
    with OpenAI(base_url=own.base_url, api_key=own.api_key, max_retries=0) as client:
        yield client


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


async def test_an_engine_on_few_cores_has_no_processes_that_spin(own: Deployment, own_client: OpenAI) -> None:
    await serving(own_client)
    cores = cores_without_gpu()
    told = {} if cores is None else on_few_cores(cores, {})
    processes = engine_processes(own)  # one that gives itself a name writes that over its environment
    assert any(told.items() <= process.environ().items() for process in processes)
    assert not (told and any("Worker" in " ".join(process.cmdline()) for process in processes))


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


async def test_many_streams_at_once(own: Deployment, own_client: OpenAI) -> None:
    await serving(own_client)
    async with AsyncOpenAI(base_url=own.base_url, api_key=own.api_key, max_retries=0) as client:
        streams = [await client.chat.completions.create(**ask(COUNT), stream=True) for _ in range(8)]
        texts = ["".join([c.choices[0].delta.content or "" async for c in stream if c.choices]) for stream in streams]
    assert texts == [COUNT.answer] * 8


async def test_a_killed_worker_leaves_no_engine_behind(tmp_path: Path) -> None:
    require_vllm()
    with penstock_with(own_engine(max_concurrency=8), tmp_path) as deployment:
        await eventually(lambda: engine_processes(deployment), timeout_s=30.0, what="an engine")
        left = engine_processes(deployment)
        psutil.Process(deployment.worker_pid).kill()
        await eventually(lambda: not any(alive(process) for process in left), timeout_s=10.0, what="the engine's end")


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
