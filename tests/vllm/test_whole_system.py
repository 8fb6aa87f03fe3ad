"""A worker's own vLLM through the whole system: it answers, its engine process is killed in a stream, and it is back by itself.

With an engine process of its own, as on a GPU: what dies is not the front end, which still answers for some seconds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from tests.vllm.asking import AS_SCHEMA, LONG, WITH_USAGE, ask, check_form, endless, joined, usage
from tests.vllm.conftest import require_vllm
from tests.vllm.deployment import Deployment, engine_processes, own_engine, penstock_with
from tests.vllm.engine import MODEL, ON_GPU
from tests.vllm.tiny_model import AS_JSON, HELLO, PARIS
from tests.waiting import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.timeout(300)]

START_TIMEOUT_S = 180.0
CACHE_TOKENS = 262_144 if ON_GPU else 131_072  # of 64 MiB with this model, at two or at four bytes a number
FRONT_END_ENDS_S = 3.0  # it takes four and more; so who heard by then didn't hear it from its end
TOLD_WITHIN_S = 0.5  # the only worker lives and has failed: nobody is waited for who could go on
TRIES_MAX = 3  # an engine on a busy machine may be done before its client has read ten chunks
# Any number but 0 puts the engine into a process of its own. With 1 vLLM's code for the CPU makes it two, which wait for each
# other by spinning (ADR 55): on two cores all the other processes then stand still for up to ten seconds.
ENGINE_APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "2"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    require_vllm()
    with penstock_with(own_engine(environ=ENGINE_APART), tmp_path_factory.mktemp("whole")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def sdk(own: Deployment) -> Iterator[OpenAI]:
    with OpenAI(base_url=own.base_url, api_key=own.api_key, max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
async def serving(sdk: OpenAI) -> None:
    await eventually(lambda: served(sdk), timeout_s=START_TIMEOUT_S, every_s=0.2, what="the engine serves")


def served(client: OpenAI) -> bool:
    return any(model.id == MODEL for model in client.models.list())


def test_text_tools_schema_and_logprobs(sdk: OpenAI) -> None:
    chunks = list(sdk.chat.completions.create(**ask(HELLO), **WITH_USAGE))
    check_form(chunks, with_usage=True)
    assert joined(chunks)[0]["content"] == HELLO.answer
    call = sdk.chat.completions.create(**ask(PARIS, tool_choice="required")).choices[0].message.tool_calls
    assert call is not None
    assert json.loads(call[0].function.arguments) == {"city": "Paris"}
    said = sdk.chat.completions.create(**ask(AS_JSON, response_format=AS_SCHEMA)).choices[0].message.content
    assert json.loads(said or "") == {"city": "Paris", "celsius": 21}
    answer = sdk.chat.completions.create(**ask(HELLO, logprobs=True, top_logprobs=2))
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or ()) == usage(answer)[1]


async def test_slots_and_numbers_are_the_engines(sdk: OpenAI, own: Deployment) -> None:
    """Nobody configured a number of slots. A prompt that was asked before comes from the engine's cache, and usage says so."""
    assert own.routes()["own"]["slots"] == CACHE_TOKENS // 2048
    asked = ask(HELLO, max_tokens=1)
    asked["messages"] = [{"role": "user", "content": "the same again " * 60}]
    first, second = [sdk.chat.completions.create(**asked).usage for _ in range(2)]
    assert first is not None
    assert second is not None
    assert second.prompt_tokens_details is not None
    cached = second.prompt_tokens_details.cached_tokens or 0
    assert 0 < cached < second.prompt_tokens
    asked_of_the_ledger = "SELECT max(cached_tokens) AS cached FROM requests"
    await eventually(lambda: own.sql(asked_of_the_ledger)[0]["cached"] == cached, what="the ledger's count")
    told = await eventually(lambda: own.routes()["own"]["engine"], timeout_s=15, what="its numbers")
    assert told.keys() == {"running", "waiting", "cache_used", "prefix_asked", "prefix_found"}
    with always_one(sdk):
        told_all = partial(numbers, own, running=1, found=cached)
        await eventually(told_all, timeout_s=30, what="what runs and was found is told")


@contextmanager
def always_one(sdk: OpenAI) -> Iterator[None]:
    """One stream at the engine at any time: the numbers are read every few seconds, and one alone may be over before."""
    over = threading.Event()

    def ask_on() -> None:
        while not over.is_set():
            with sdk.chat.completions.create(**endless(HELLO, tokens=LONG), stream=True) as stream:
                while not over.is_set() and next(stream, None) is not None:
                    pass

    with ThreadPoolExecutor(1) as pool:
        asker = pool.submit(ask_on)
        try:
            yield
        finally:
            over.set()
        asker.result()


def numbers(own: Deployment, *, running: int, found: int) -> bool:
    """They are some seconds old: they may be those of the moment before the prompt was found."""
    told = own.routes()["own"]["engine"]
    return bool(told) and told["running"] == running and told["prefix_found"] >= found


async def test_an_engine_that_is_killed_is_an_honest_error_at_once_and_is_back_by_itself(
    sdk: OpenAI, own: Deployment
) -> None:
    for _ in range(TRIES_MAX):
        with sdk.chat.completions.create(**endless(HELLO, tokens=LONG), **WITH_USAGE) as stream:
            request_id = stream.response.headers["x-request-id"]
            read = [next(stream) for _ in range(10)]
            (core,) = [process for process in engine_processes(own) if is_core(process)]
            core.kill()
            killed_at = time.monotonic()
            await eventually(lambda: not served(sdk), timeout_s=FRONT_END_ENDS_S, what="the route is down")
            down_s = time.monotonic() - killed_at
            with pytest.raises(openai.InternalServerError) as refused:
                sdk.chat.completions.create(**ask(HELLO))
            assert refused.value.status_code == 503
            assert "the engine" in refused.value.message
            told = as_far_as_it_goes(stream, read)
        told_s = time.monotonic() - killed_at
        await eventually(lambda: served(sdk), timeout_s=START_TIMEOUT_S, every_s=0.2, what="it is back")
        if told is not None:
            break
        assert usage(read[-1])[1] == LONG, "without an error it is whole: the engine was done before it died"
    assert told is not None
    assert told.message
    assert down_s < FRONT_END_ENDS_S
    assert told_s < TOLD_WITHIN_S + FRONT_END_ENDS_S
    assert not any(choice.finish_reason for chunk in read for choice in chunk.choices), "it is no end"
    row = await eventually(lambda: own.request(request_id), what="the ledger's row")
    assert row["status"] == "failed"
    assert row["completion_tokens"] >= len([chunk for chunk in read if chunk.choices]) - 1
    sys.stdout.write(f"error after {told_s:.3f} s, down after {down_s:.3f} s\n")
    assert sdk.chat.completions.create(**ask(HELLO)).choices[0].message.content == HELLO.answer


def as_far_as_it_goes(stream: openai.Stream[Any], read: list[Any]) -> openai.APIError | None:
    """Adds what comes to *read*; the error that it ends with."""
    try:
        read.extend(stream)
    except openai.APIError as error:
        return error
    return None


def is_core(process: psutil.Process) -> bool:
    return "EngineCore" in " ".join(process.cmdline())


async def test_an_engine_that_ends_whole_is_back_by_itself(sdk: OpenAI, own: Deployment) -> None:
    """Front end and all, as when the system's memory is over."""
    stream = sdk.chat.completions.create(**endless(HELLO, tokens=LONG), stream=True)
    next(stream)
    for process in engine_processes(own):
        process.kill()
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    await eventually(lambda: not served(sdk), timeout_s=10.0, what="the route is down")
    await eventually(lambda: served(sdk), timeout_s=START_TIMEOUT_S, every_s=0.2, what="it is back")
    assert sdk.chat.completions.create(**ask(HELLO)).choices[0].message.content == HELLO.answer


def test_the_engines_log_is_in_the_home(own: Deployment) -> None:
    folder = own.home / "run" / "worker"
    assert {path.name for path in folder.iterdir()} >= {"own.log", "own.sock"}
    assert folder.stat().st_mode & 0o777 == 0o700
