"""The servers' habits, by way of the queue: what a client is told is the same whoever answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from schemas.frames import Delta, Faulted, Finished
from tests.integration.discover.conftest import Boot, Machine
from tests.local_servers import Chat, LlamaCpp, LmStudio, Ollama, Reply, Vllm

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def ollama() -> Chat:
    made = Ollama()
    made.pull("m")
    return made


def old_ollama() -> Chat:
    made = Ollama(old=True)
    made.pull("m")
    return made


def lm_studio() -> Chat:
    made = LmStudio()
    made.pull("m")
    return made


def llama_cpp() -> Chat:
    return LlamaCpp(model="m")


def vllm() -> Chat:
    return Vllm(model="m")


ROUTES = {ollama: "ollama", old_ollama: "ollama", lm_studio: "lmstudio", llama_cpp: "llamacpp", vllm: "vllm"}
everybody = pytest.mark.parametrize("make", ROUTES, ids=lambda make: make.__name__)
Make = Callable[[], Chat]


class Told:
    """What a client would have been told of one request."""

    def __init__(self, machine: Machine, last: Finished, nonce: Any) -> None:
        frames = [f for f in machine.frames[nonce] if isinstance(f, Delta | Finished)]
        chunks = [msgspec.json.decode(chunk) for frame in frames for chunk in frame.chunks]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        said = [choice.get("message") or choice["delta"] for choice in choices]
        self.text = "".join(each.get("content") or "" for each in said)
        self.reasoning = "".join(each.get("reasoning_content") or "" for each in said)
        self.calls = [call for each in said for call in each.get("tool_calls") or ()]
        self.finishes = [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
        self.usage = last.usage
        self.tokens = sum(frame.tokens for frame in frames)


async def ask(boot: Boot, server: Chat, route: str, body: dict[str, Any]) -> Told:
    async with server:
        machine = await boot(server)
        await machine.serves(route, "m")
        job = await machine.send(route, "m", body)
        last = await machine.ended(job)
        assert isinstance(last, Finished)
        return Told(machine, last, job.nonce)


@everybody
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_text_and_usage(boot: Boot, make: Make, stream: bool) -> None:
    told = await ask(boot, make(), ROUTES[make], {"stream": stream})
    assert told.text == "one two three four five "
    assert told.finishes == ["stop"]
    if make is lm_studio and stream:
        assert told.usage is None, "it tells none before 0.3.18: then the worker's own count is what there is"
        assert told.tokens == 5
    else:
        assert told.usage is not None
        assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (7, 5)


@everybody
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_reasoning_has_one_name(boot: Boot, make: Make, stream: bool) -> None:
    body = {"stream": stream, "messages": [{"role": "user", "content": "think"}]}
    told = await ask(boot, make(), ROUTES[make], body)
    assert told.reasoning == "hm"
    assert told.text == "one two three four five "


@everybody
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_tool_calls_in_one_piece(boot: Boot, make: Make, stream: bool) -> None:
    told = await ask(boot, make(), ROUTES[make], {"stream": stream, "tools": TOOLS})
    (call,) = told.calls
    assert msgspec.json.decode(call["function"]["arguments"]) == {"city": "Oslo"}
    assert (call["id"], call["type"], call.get("index")) == ("call_1", "function", 0 if stream else None)
    assert told.finishes == ["tool_calls"]


@everybody
async def test_a_limit_under_its_newer_name_is_kept(boot: Boot, make: Make) -> None:
    """Ollama hears only the older name, and would go on until it has no more to say."""
    told = await ask(boot, make(), ROUTES[make], {"max_completion_tokens": 2})
    assert told.text == "one two "
    assert told.finishes == ["length"]


async def test_an_error_in_the_middle_of_a_200_is_an_error(boot: Boot) -> None:
    """llama.cpp says 200 before it looks at the prompt, and older builds write the error in a field of its own."""
    error = b'{"code":400,"message":"the request exceeds the context size","type":"exceed_context_size_error"}'
    server = LlamaCpp(model="m")
    async with server:
        machine = await boot(server)
        await machine.serves("llamacpp", "m")
        for event in (b'data: {"error":' + error + b"}\n\n", b"error: " + error + b"\n\n"):
            server.broken["m"] = Reply(events=[event])
            faulted = await machine.ended(await machine.send("llamacpp", "m", {"stream": True}))
            assert isinstance(faulted, Faulted)
            assert faulted.status == 400
            assert "context size" in faulted.message
