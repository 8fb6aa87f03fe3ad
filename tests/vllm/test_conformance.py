"""The provider `vllm` before a real engine keeps what every provider promises, and what only it can."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from schemas.errors import ProviderRejected
from schemas.ids import RouteId
from schemas.settings import ModelSettings, RouteSettings, VllmSettings, WorkerSettings
from tests.factories import make_job
from tests.integration.providers.conftest import SetUp
from tests.integration.providers.heard import Heard, hear
from tests.integration.providers.test_conformance import (  # noqa: F401 - they run here, with the fixtures below
    test_a_body_that_is_no_request_is_a_fault_and_nothing_else,
    test_answer_without_streaming_is_one_chunk_with_everything,
    test_cancelling_the_task_stops_the_work_at_once,
    test_chunks_are_objects_with_choices_and_without_what_is_the_ingresss,
    test_closing_the_stream_stops_the_work_at_once,
    test_closing_twice_is_closing_once,
    test_models_are_named,
    test_stream_ends_with_its_usage,
    test_stream_opens_with_the_role_and_each_choice_finishes_once,
    test_tokens_of_the_chunks_add_up_to_about_the_usage,
)
from tests.vllm.asking import AS_SCHEMA, LONG
from tests.vllm.engine import MODEL, RUNNING, SLOTS, Engine, tiny_model_folder
from tests.vllm.tiny_model import AS_JSON, COUNT, HELLO, PARIS, THINK, Conversation
from tests.waiting import eventually
from workers.providers.vllm import Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.timeout(300)]

ABORTS = 20
ABORT_MAX_S = 0.05  # in the median; one in twenty may meet a busy machine


def asking(conversation: Conversation, **members: Any) -> dict[str, Any]:
    tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    return {"messages": conversation.messages, "temperature": 0, **tools, **members}


ENDLESS = asking(HELLO, max_tokens=LONG, ignore_eos=True)
VARIED = {"temperature": 2.0, "seed": 7, "max_tokens": 24}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
BODIES: dict[str, dict[str, Any]] = {
    "text": asking(HELLO),
    "several choices": asking(HELLO, **VARIED, n=3),
    "seed": asking(HELLO, **VARIED),
    "stop": asking(COUNT, stop=[" five", "nothing"]),
    "limit": asking(COUNT, max_tokens=3),
    "newer limit": asking(COUNT, max_completion_tokens=2),
    "tools": asking(PARIS),
    "tool required": asking(PARIS, tool_choice="required"),
    "tool named": asking(PARIS, tool_choice=NAMED),
    "schema": asking(AS_JSON, response_format=AS_SCHEMA),
    "logprobs": asking(HELLO, logprobs=True, top_logprobs=2),
    "reasoning": asking(THINK, reasoning_effort="low"),
    "unknown fields": asking(HELLO, something_new={"a": [1.50, None]}),
    "parts": {**asking(HELLO), "messages": [{"role": "user", "content": [{"type": "text", "text": HELLO.question}]}]},
}


@dataclass
class EngineSetUp(SetUp):
    engine: Engine | None = None

    def answering(self) -> int:
        assert self.engine is not None
        return int(self.engine.metric(RUNNING))


@pytest.fixture
async def vllm(engine: Engine) -> AsyncIterator[Vllm]:
    route = RouteSettings(
        id=RouteId("r"),
        provider="vllm",
        base_url=f"{engine.base_url}/v1",
        models=(ModelSettings(name="m", upstream=MODEL),),
        vllm=VllmSettings(model=str(tiny_model_folder())),
    )
    provider = Vllm.from_route(route, WorkerSettings())
    told: list[str | None] = []
    provider.attach(told.append)
    await eventually(lambda: told and told[-1] is None, timeout_s=60, what="the engine is probed")
    yield provider
    await provider.aclose()
    await eventually(lambda: engine.metric(RUNNING) == 0, what="a free engine")


@pytest.fixture
def setup(vllm: Vllm, engine: Engine) -> SetUp:
    return EngineSetUp(provider=vllm, slow=vllm, slowly=ENDLESS, engine=engine)


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest) -> dict[str, Any]:
    return BODIES[request.param]


async def ask(vllm: Vllm, body: dict[str, Any], *, stream: bool = True) -> Heard:
    return await hear(vllm, make_job({**body, "stream": stream}))


async def test_its_powers_are_found_by_asking(vllm: Vllm) -> None:
    assert vllm.powers.token_ids
    fingerprint = vllm.fingerprint("m")
    assert fingerprint is not None
    assert None not in (fingerprint.tokenizer, fingerprint.template, fingerprint.weights)


@pytest.mark.parametrize("stream", [True, False])
async def test_every_token_has_its_id_and_the_prompts_come_once(vllm: Vllm, body: dict[str, Any], stream: bool) -> None:
    heard = await ask(vllm, body, stream=stream)
    usage = heard.usages[-1].usage
    assert usage is not None
    prompts = [chunk.prompt_token_ids for chunk in heard.chunks if chunk.prompt_token_ids]
    ids = [i for chunk in heard.chunks for i in chunk.token_ids]
    assert not any(b"token_ids" in piece for piece in heard.pieces)
    if "n" in body:
        assert not prompts
        assert not ids
    else:
        assert [len(prompt) for prompt in prompts] == [usage.prompt_tokens]
        assert len(ids) == usage.completion_tokens
    assert heard.tokens == usage.completion_tokens


@pytest.mark.parametrize("conversation", [HELLO, COUNT, AS_JSON], ids=lambda c: c.question)
async def test_text_comes_through_untouched(vllm: Vllm, conversation: Conversation) -> None:
    heard = await ask(vllm, asking(conversation))
    assert heard.text == conversation.answer
    assert heard.voices[0].finish == ["stop"]


async def test_stream_says_the_same_as_the_answer_without_streaming(vllm: Vllm, body: dict[str, Any]) -> None:
    """But for the ids of tool calls, which are new in every answer."""
    streamed, whole = await ask(vllm, body), await ask(vllm, body, stream=False)
    assert streamed.voices.keys() == whole.voices.keys()
    for index, voice in streamed.voices.items():
        other = whole.voices[index]
        assert (voice.text, voice.role, voice.called, voice.finish) == (
            other.text,
            other.role,
            other.called,
            other.finish,
        )
    assert streamed.usages[0].usage == whole.usages[0].usage


async def test_stop_ends_the_text_before_it(vllm: Vllm) -> None:
    heard = await ask(vllm, BODIES["stop"])
    assert heard.text == COUNT.answer[: COUNT.answer.index(" five")]
    assert heard.voices[0].finish == ["stop"]


async def test_limit_ends_the_text_with_length(vllm: Vllm) -> None:
    heard = await ask(vllm, BODIES["limit"])
    assert heard.voices[0].finish == ["length"]
    assert heard.usages[0].usage is not None
    assert heard.usages[0].usage.completion_tokens == 3


@pytest.mark.parametrize("kind", ["tools", "tool required", "tool named"])
@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_have_valid_arguments(vllm: Vllm, kind: str, stream: bool) -> None:
    heard = await ask(vllm, BODIES[kind], stream=stream)
    for name, arguments in heard.voices[0].called:
        assert name == "get_weather"
        assert isinstance(json.loads(arguments)["city"], str)
    assert heard.voices[0].called


async def test_a_schema_binds(vllm: Vllm) -> None:
    said = json.loads((await ask(vllm, asking(HELLO, response_format=AS_SCHEMA, max_tokens=100))).text)
    assert said.keys() == {"city", "celsius"}


async def test_the_same_seed_says_the_same(vllm: Vllm) -> None:
    first, again, other = [(await ask(vllm, asking(HELLO, **{**VARIED, "seed": seed}))).text for seed in (7, 7, 8)]
    assert first == again != other


@pytest.mark.parametrize(
    "members",
    [{"max_tokens": 10**6}, {"n": 2}, {"messages": [{"role": "user", "content": "x " * 20_000}]}, {"temperature": -1}],
    ids=["limit over the context", "n without a temperature", "prompt over the context", "temperature"],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_engine_refuses_is_a_rejection_in_its_words(
    vllm: Vllm, members: dict[str, Any], stream: bool
) -> None:
    with pytest.raises(ProviderRejected) as caught:
        await ask(vllm, asking(HELLO, **members), stream=stream)
    assert caught.value.status == 400
    assert len(caught.value.message) > 10


async def test_streams_at_once_do_not_mix(vllm: Vllm) -> None:
    wanted = [HELLO, COUNT, AS_JSON] * SLOTS
    heard = await asyncio.gather(*(ask(vllm, asking(conversation)) for conversation in wanted))
    assert [each.text for each in heard] == [conversation.answer for conversation in wanted]


async def test_closing_a_stream_frees_the_engines_slot_within_50_ms(vllm: Vllm, engine: Engine) -> None:
    """By the engine's own count of what it runs. Asking for that takes a millisecond or two, which are in the figure."""
    freed_s = []
    for _ in range(ABORTS):
        chunks = vllm.generate(make_job({**ENDLESS, "stream": True}))
        await anext(chunks)
        await eventually(lambda: engine.metric(RUNNING) == 1, what="it runs")
        began = time.monotonic()
        await chunks.aclose()
        while engine.metric(RUNNING):
            await asyncio.sleep(0)
            assert time.monotonic() - began < 2.0
        freed_s.append(time.monotonic() - began)
    freed_s.sort()
    told = ", ".join(f"{each * 1000:.1f}" for each in freed_s)
    sys.stdout.write(f"freed after ms: {told}\n")
    assert freed_s[ABORTS // 2] < ABORT_MAX_S, told
