"""How a worker goes on with an answer that broke off elsewhere: what it asks its provider, and what it must not say again."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from schemas.errors import NotContinued
from schemas.ids import RouteId
from schemas.jobs import Continuation, Continues, Job
from schemas.providers import known_providers
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings
from tests.factories import make_job
from workers.providers.base import Chunk, joined
from workers.providers.echo import Echo
from workers.providers.known import Known
from workers.providers.prefill import MARKS, prefilled, read_request
from workers.providers.vllm_continuation import Seam, completion_body, held_back, why_not_exact
from workers.seam import seamless

BEFORE = Continuation(text="one two", tokens=2, token_ids=(11, 12), prompt_token_ids=(1, 2, 3))


def job(before: Continuation = BEFORE, **members: Any) -> Job:
    return make_job({"stream": True, **members}, continuation=before)


def asked(prepared: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(prepared.body))
    return found


def test_the_answer_so_far_is_the_last_message_and_the_limits_shrink() -> None:
    body = asked(prefilled(job(max_tokens=10, min_tokens=1, unheard_of=[1.50]), BEFORE, mark={"partial": True}))
    assert body["messages"][-1] == {"role": "assistant", "content": "one two", "partial": True}
    assert len(body["messages"]) == 2
    assert (body["max_tokens"], body["min_tokens"], body["unheard_of"]) == (8, 0, [1.5])


@pytest.mark.parametrize(
    ("before", "members"),
    [
        (BEFORE, {"max_tokens": 2}),
        (BEFORE, {"max_completion_tokens": 1}),
        (BEFORE, {"stop": ["wolf"]} | {"stop": "two and"}),
        (Continuation(text="a", reasoning="because", tokens=2), {}),
    ],
    ids=["limit", "newer limit", "stop", "reasoning"],
)
def test_what_cannot_go_on_behind_its_text(before: Continuation, members: dict[str, Any]) -> None:
    with pytest.raises(NotContinued):
        prefilled(job(before, **members), before)


@pytest.mark.parametrize("name", ["groq", "moonshot", "openai", "mistral"])
def test_a_known_provider_goes_on_if_the_table_says_how(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in known_providers()[name].key_env:
        monkeypatch.setenv(variable, "k")
    route = RouteSettings(id=RouteId("r"), provider=name, models=(ModelSettings(name="m"),))
    known = known_providers()[name]
    wanted = Continues.PREFIX if known.prefill in MARKS else Continues.NO
    assert Known.of(known, route, WorkerSettings()).continues("m") is wanted
    assert wanted is (Continues.PREFIX if name in ("groq", "moonshot") else Continues.NO)


@pytest.mark.parametrize(
    "members",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"unheard_of": True},
        {"logits_processors": ["x"]},
        {"stop": "x", "min_tokens": 3},
    ],
    ids=["tools", "image", "unknown", "processors", "stops that don't count yet"],
)
def test_what_is_not_gone_on_with_exactly(members: dict[str, Any]) -> None:
    made = job(**members)
    assert why_not_exact(made, read_request(made)) is not None


def test_what_is_gone_on_with_exactly_takes_along_what_matters() -> None:
    made = job(temperature=0.5, seed=7, top_k=3, max_tokens=10, min_tokens=4, user="me", logprobs=True, top_logprobs=2)
    request = read_request(made)
    assert why_not_exact(made, request) is None
    body = completion_body(made, request, Seam((11,), 1, ""), upstream_model="theirs", context_tokens=100)
    assert body is not None
    sent = json.loads(body)
    assert sent["prompt"] == [1, 2, 3, 11]
    assert (sent["max_tokens"], sent["min_tokens"], sent["logprobs"]) == (9, 3, 2)
    assert (sent["temperature"], sent["seed"], sent["top_k"], sent["model"]) == (0.5, 7, 3, "theirs")
    assert not {"user", "messages", "stop", "top_logprobs"} & sent.keys()


def test_without_a_limit_there_is_the_rest_of_the_context_and_none_if_that_is_full() -> None:
    made = job()
    request, seam = read_request(made), Seam((11, 12), 0, "")
    body = completion_body(made, request, seam, upstream_model="m", context_tokens=100)
    assert body is not None
    assert json.loads(body)["max_tokens"] == 95
    assert completion_body(made, request, seam, upstream_model="m", context_tokens=5) is None


@pytest.mark.parametrize(
    ("text", "before", "held"),
    [
        ("one two three", BEFORE, " three"),
        ("one two", BEFORE, ""),
        ("one tw", BEFORE, None),
        ("one two\ufffd", BEFORE, None),
        ("on the two", BEFORE, None),
        ("<think>why</think>\n\nso it is", Continuation(text="so", reasoning="why", tokens=9), " it is"),
        ("<think>why", Continuation(reasoning="why", tokens=3), None),
        ("<think>why</think>a, a", Continuation(text="a", reasoning="why", tokens=9), None),
    ],
    ids=["held", "nothing", "less", "half a character", "another", "reasoned", "in its reasoning", "ambiguous"],
)
def test_what_was_held_back_is_what_the_tokens_say_beyond_the_text(
    text: str, before: Continuation, held: str | None
) -> None:
    assert held_back(text, before) == held


async def chunks(*members: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
    for each in members:
        yield Chunk(members=json.dumps(each).encode(), tokens=1)


async def test_the_role_is_not_said_again() -> None:
    opening = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    both = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}]}
    plain = {"choices": [{"index": 0, "delta": {"content": 'b "role"'}, "finish_reason": "stop"}]}
    told = [json.loads(chunk.members or b"") async for chunk in seamless(chunks(opening, both, plain))]
    assert [each["choices"][0]["delta"] for each in told] == [{"content": "a"}, {"content": 'b "role"'}]
    assert told[-1]["choices"][0]["finish_reason"] == "stop"
    together = joined([chunk async for chunk in chunks(opening, both, plain)])
    (one,) = [chunk async for chunk in seamless(_just(together))]
    assert [json.loads(piece) for piece in one.pieces] == told


async def _just(chunk: Chunk | None) -> AsyncGenerator[Chunk, None]:
    assert chunk is not None
    yield chunk


async def heard(before: Continuation | None, text: str = "one two three four") -> list[Chunk]:
    made = make_job({"stream": True, "messages": [{"role": "user", "content": text}]}, continuation=before)
    return [chunk async for chunk in Echo().generate(made)]


async def test_echo_goes_on_behind_tokens_and_behind_text() -> None:
    unbroken = await heard(None)
    ids = tuple(i for chunk in unbroken for i in chunk.token_ids)
    by_ids = await heard(Continuation(text="one two", tokens=2, token_ids=ids[:2]))
    by_text = await heard(Continuation(text="one two", tokens=2))
    assert [chunk.members for chunk in by_ids] == [chunk.members for chunk in by_text]
    assert [chunk.members for chunk in by_ids[:-1]] == [chunk.members for chunk in unbroken[3:-1]]
    usage = by_ids[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 2)


@pytest.mark.parametrize(
    "before", [Continuation(text="two", tokens=1), Continuation(text="one", tokens=1, token_ids=(5,))]
)
async def test_echo_does_not_go_on_with_somebody_elses_answer(before: Continuation) -> None:
    with pytest.raises(NotContinued):
        await heard(before)
