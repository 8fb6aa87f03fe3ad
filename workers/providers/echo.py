"""The built-in provider: answers at once, always the same, without a model.

It is what a fresh deployment serves, what SDKs and agent frameworks are tried against, and a load without a GPU.
Source: docs/adr/0023-echo.md
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncGenerator, Iterator

import msgspec

from schemas.errors import NotContinued
from schemas.jobs import Continuation, Continues, Job, ModelFingerprint
from schemas.money import Usage
from schemas.settings import ModelSettings, RouteSettings
from workers.providers.base import Chunk, Provider, Tell
from workers.providers.echo_answer import Answer, Call, Request, answer, read

BREATH_EVERY_CHUNKS = 32  # at full speed, other tasks get their turn this often
FINGERPRINT = "fp_echo"

_json = msgspec.json.encode
_TAIL = b'],"system_fingerprint":' + _json(FINGERPRINT) + b"}"

Delta = tuple[bytes, str | None, bytes]  # a delta as JSON, its token if it has one, its logprobs as JSON


class Echo(Provider):
    """Says what it was told. *tokens_per_s* is the pace of each stream, 0 for no limit; *delay_s* comes first."""

    name = "echo"

    def __init__(
        self, models: tuple[ModelSettings, ...] = (), *, tokens_per_s: float = 0.0, delay_s: float = 0.0
    ) -> None:
        self._upstream = {model.name: model.upstream_name for model in models}
        self._pause_s = 1 / tokens_per_s if tokens_per_s > 0 else 0.0
        self._delay_s = delay_s

    @classmethod
    def from_route(cls, route: RouteSettings) -> Echo:
        return cls(route.models, tokens_per_s=route.tokens_per_s, delay_s=route.delay_ms / 1000)

    def upstream_model(self, model: str) -> str:
        return self._upstream.get(model, model)

    async def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """Raises: ProviderRejected, NotContinued."""
        start_s = asyncio.get_running_loop().time() + self._delay_s
        request = read(job.body)
        said = answer(request)
        told = 0 if job.continuation is None else _told(said, job.continuation)
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        if not job.stream:
            await self._wait_for(said.completion_tokens // said.choices, start_s)
            yield _whole(said, request)
            return
        spoken = 0
        for number, (chunk, first) in enumerate(_chunks(said, request, told), start=1):
            spoken += chunk.tokens if first else 0
            await self._wait_for(spoken, start_s)
            yield chunk
            if number % BREATH_EVERY_CHUNKS == 0:
                await asyncio.sleep(0)
        usage, raw = _usage(said, told)
        yield Chunk(members=None, usage=usage, usage_raw=raw)

    def continues(self, model: str) -> Continues:  # noqa: ARG002
        return Continues.EXACT

    async def models(self) -> tuple[str, ...]:
        return (self.name,)

    def fingerprint(self, model: str) -> ModelFingerprint | None:
        return ModelFingerprint(name=self.upstream_model(model), tokenizer=FINGERPRINT)

    def attach(self, tell: Tell) -> None:
        """It can always serve."""

    async def aclose(self) -> None:
        pass

    async def _wait_for(self, spoken: int, start_s: float) -> None:
        """Until *spoken* tokens may have been said. The pace is kept from the start: a late token makes none after it late."""
        if self._pause_s:
            wait_s = start_s + spoken * self._pause_s - asyncio.get_running_loop().time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)


def _told(said: Answer, before: Continuation) -> int:
    """How many tokens of *said* its client has. Raises: NotContinued if what it has is something else."""
    count = len(before.token_ids)
    if before.token_ids:
        same = before.token_ids == tuple(map(_token_id, said.text[:count]))
    else:
        length = 0
        while length < len(before.text) and count < len(said.text):
            length += len(said.text[count])
            count += 1
        same = "".join(said.text[:count]) == before.text
    if said.calls or said.choices > 1 or not same:
        raise NotContinued
    return count


def _token_id(token: str) -> int:
    """A number that this token always has."""
    return zlib.crc32(token.encode())


def _chunks(said: Answer, request: Request, told: int) -> Iterator[tuple[Chunk, bool]]:
    """The stream, choice by choice in turn; with each chunk, whether it belongs to the first choice.

    The first *told* tokens are left out, and then the opening is, too.
    """
    voices = [_deltas(said, request, choice, told) for choice in range(said.choices)]
    for row in zip(*voices, strict=True):
        for index, (delta, token, logprobs) in enumerate(row):
            members = b'{"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null}' % (
                index,
                delta,
                logprobs,
            )
            ids = () if token is None or said.calls or said.choices > 1 else (_token_id(token),)
            yield Chunk(members=members + _TAIL, tokens=int(token is not None), token_ids=ids), index == 0
    finish = _json(said.finish_reason)
    for index in range(said.choices):
        members = b'{"choices":[{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}' % (index, finish)
        reason = said.finish_reason if index == 0 else None
        yield Chunk(members=members + _TAIL, finish_reason=reason), index == 0


def _deltas(said: Answer, request: Request, choice: int, told: int) -> Iterator[Delta]:
    if not told:
        opening = b'{"role":"assistant","content":%b,"refusal":null}'
        yield opening % (b"null" if said.calls else b'""'), None, b"null"
    for token in said.text[told:]:
        yield b'{"content":%b}' % _json(token), token, _logprobs([token], request)
    for place, call in enumerate(said.calls):
        yield from _call_deltas(call, place, _call_id(request, call, (choice, place)))


def _call_deltas(call: Call, place: int, id_: str) -> Iterator[Delta]:
    """As OpenAI sends a call: first its id and name without arguments, then the arguments in pieces."""
    name = _json(call.name)
    if call.kind == "legacy":
        yield b'{"function_call":{"name":%b,"arguments":""}}' % name, call.name, b"null"
        for piece in call.pieces:
            yield b'{"function_call":{"arguments":%b}}' % _json(piece), piece, b"null"
        return
    kind, said = (b"custom", b"input") if call.kind == "custom" else (b"function", b"arguments")
    opening = b'{"tool_calls":[{"index":%d,"id":%b,"type":"%b","%b":{"name":%b,"%b":""}}]}'
    yield opening % (place, _json(id_), kind, kind, name, said), call.name, b"null"
    for piece in call.pieces:
        yield b'{"tool_calls":[{"index":%d,"%b":{"%b":%b}}]}' % (place, kind, said, _json(piece)), piece, b"null"


def _whole(said: Answer, request: Request) -> Chunk:
    finish = _json(said.finish_reason)
    logprobs = b"null" if said.calls else _logprobs(said.text, request)
    choices = b",".join(
        b'{"index":%d,"message":%b,"logprobs":%b,"finish_reason":%b}'
        % (index, _json(_message(said, request, index)), logprobs, finish)
        for index in range(said.choices)
    )
    usage, raw = _usage(said, 0)
    return Chunk(
        members=b'{"choices":[' + choices + _TAIL,
        tokens=said.completion_tokens,
        finish_reason=said.finish_reason,
        usage=usage,
        usage_raw=raw,
    )


def _message(said: Answer, request: Request, choice: int) -> dict[str, object]:
    message: dict[str, object] = {
        "role": "assistant",
        "content": None if said.calls else "".join(said.text),
        "refusal": None,
        "annotations": [],
    }
    for place, call in enumerate(said.calls):
        text = "".join(call.pieces)
        if call.kind == "legacy":
            message["function_call"] = {"name": call.name, "arguments": text}
            continue
        key = "input" if call.kind == "custom" else "arguments"
        calls = message.setdefault("tool_calls", [])
        assert isinstance(calls, list)  # noqa: S101 - set a line above
        inner = {"name": call.name, key: text}
        calls.append({"id": _call_id(request, call, (choice, place)), "type": call.kind, call.kind: inner})
    return message


def _call_id(request: Request, call: Call, place: tuple[int, int]) -> str:
    """The same for the same conversation, and another one in each turn, choice and place."""
    seed = f"{len(request.messages)} {place} {call.name} {''.join(call.pieces)}"
    return "call_" + hashlib.sha256(seed.encode()).hexdigest()[:24]


def _logprobs(texts: list[str], request: Request) -> bytes:
    """Every token is certain: its logarithm is 0, and there is no other candidate."""
    if not request.logprobs:
        return b"null"
    content = []
    for text in texts:
        token = {"token": text, "logprob": 0.0, "bytes": list(text.encode())}
        content.append({**token, "top_logprobs": [token] if request.top_logprobs else []})
    return _json({"content": content, "refusal": None})


def _usage(said: Answer, told: int) -> tuple[Usage, bytes]:
    """Of a continuation, the *told* tokens are part of the prompt."""
    usage = Usage(
        prompt_tokens=said.prompt_tokens + told, completion_tokens=said.completion_tokens - told * said.choices
    )
    raw = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
    return usage, _json(raw)
