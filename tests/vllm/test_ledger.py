"""The ledger tells what happened at the engine: every request once, with the engine's own numbers."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.vllm.asking import LONG, WITH_USAGE, ask, endless, usage
from tests.vllm.deployment import INPUT_PICO, OUTPUT_PICO, Deployment
from tests.vllm.engine import GENERATED, RUNNING, Engine
from tests.vllm.tiny_model import COUNT, HELLO, PARIS
from tests.waiting import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.timeout(300)]


async def test_ledger_has_the_engines_usage_of_an_answer(client: OpenAI, deployment: Deployment) -> None:
    raw = client.chat.completions.with_raw_response.create(**ask(PARIS))
    prompt, completion, _ = usage(raw.parse())
    row = await recorded(deployment, raw.headers["x-request-id"])
    assert row == row | {
        "model": "tiny",
        "route": "tiny",
        "status": "completed",
        "http_status": 200,
        "stream": False,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "finish_reason": "tool_calls",
        "estimated": False,
        "attempts": 1,
    }
    assert round(float(row["cost_usd"]) * 10**12) == prompt * INPUT_PICO + completion * OUTPUT_PICO


@pytest.mark.parametrize("options", [{"stream": True}, WITH_USAGE], ids=["usage unasked", "usage asked"])
async def test_ledger_has_the_engines_usage_of_a_stream(
    client: OpenAI, direct: OpenAI, deployment: Deployment, options: dict[str, Any]
) -> None:
    prompt, completion, _ = usage(direct.chat.completions.create(**ask(COUNT)))
    with client.chat.completions.create(**ask(COUNT), **options) as stream:
        for _ in stream:
            pass
    row = await recorded(deployment, stream.response.headers["x-request-id"])
    assert row == row | {
        "status": "completed",
        "stream": True,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "finish_reason": "stop",
        "estimated": False,
    }


async def test_ledger_has_a_refusal_of_the_engine(client: OpenAI, deployment: Deployment) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask(HELLO, max_tokens=10**6))
    row = await recorded(deployment, caught.value.response.headers["x-request-id"])
    assert row == row | {"status": "failed", "http_status": 400, "completion_tokens": 0}
    assert float(row["cost_usd"]) == 0


async def test_client_that_leaves_a_stream_frees_the_engine(
    client: OpenAI, engine: Engine, deployment: Deployment
) -> None:
    before = engine.metric(GENERATED)
    with client.chat.completions.create(**endless(COUNT, tokens=LONG), **WITH_USAGE) as stream:
        read = [next(stream) for _ in range(5)]
    await idle(engine)
    assert engine.metric(GENERATED) - before < LONG, "it ran to its end"
    row = await recorded(deployment, stream.response.headers["x-request-id"])
    assert row["status"] == "cancelled"
    assert len(read) - 1 <= row["completion_tokens"] < LONG
    assert row["prompt_tokens"] > 0


async def test_client_that_leaves_while_it_waits_frees_the_engine(
    async_client: AsyncOpenAI, engine: Engine, deployment: Deployment
) -> None:
    """Without streaming nothing has come yet, so the row is found by what it says and not by its id."""
    before = engine.metric(GENERATED)
    cancelled = count(deployment, "cancelled")
    waiting = asyncio.create_task(async_client.chat.completions.create(**endless(COUNT, tokens=LONG)))
    await eventually(lambda: engine.metric(RUNNING) == 1, what="the engine at work")
    waiting.cancel()
    await idle(engine)
    assert engine.metric(GENERATED) - before < LONG, "it ran to its end"
    await eventually(lambda: count(deployment, "cancelled") == cancelled + 1, what="one more cancelled request")


async def test_every_request_is_one_row_and_every_token_is_counted(
    async_client: AsyncOpenAI, engine: Engine, deployment: Deployment
) -> None:
    """Twenty requests at once: what the ledger adds up is what the engine itself counted."""
    rows, completed = count(deployment), count(deployment, "completed")
    tokens, generated = counted_tokens(deployment), engine.metric(GENERATED)
    asked = [endless(HELLO, tokens=20 + i) for i in range(20)]
    await asyncio.gather(*(async_client.chat.completions.create(**a) for a in asked))
    await eventually(lambda: count(deployment, "completed") == completed + len(asked), what="the end of every request")
    assert count(deployment) == rows + len(asked)
    assert counted_tokens(deployment) - tokens == sum(range(20, 40)) == engine.metric(GENERATED) - generated


async def recorded(deployment: Deployment, request_id: str) -> dict[str, Any]:
    """The ledger's row; its writer runs behind the events by some milliseconds."""
    return await eventually(lambda: deployment.request(request_id), what=f"the row of {request_id}")


async def idle(engine: Engine) -> None:
    await eventually(lambda: engine.metric(RUNNING) == 0, what="a free engine", timeout_s=3)


def count(deployment: Deployment, status: str = "%") -> int:
    return int(deployment.sql("SELECT count(*) AS n FROM requests WHERE status LIKE ?", status)[0]["n"])


def counted_tokens(deployment: Deployment) -> int:
    return int(deployment.sql("SELECT coalesce(sum(completion_tokens), 0) AS n FROM requests")[0]["n"])
