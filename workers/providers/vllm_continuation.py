"""How vLLM goes on with an answer that another engine began, behind its tokens. Pure.

``/v1/completions`` takes the tokens of the prompt and of the answer so far, so what comes is what would have come. The
text of the tokens that were delivered may be ahead of the text that was: the first engine held back half characters, and what
might have become a stop sequence. That text is said first; a half character's tokens are generated anew.
Source: docs/adr/0066-continuation.md, docs/adr/0068-seam.md
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw, Struct

from schemas.errors import ProviderFailed, ProviderNonsense
from schemas.jobs import Continuation, Job
from schemas.money import Usage
from workers.providers.base import Chunk
from workers.providers.openai_chunks import DONE, GIVEN_UP
from workers.providers.openai_faults import complaint_of, refusal_inside
from workers.providers.prefill import Request
from workers.providers.stops import StopScanner

HALF_CHARACTER = "\ufffd"  # what the decoder makes of a character whose bytes are not all there
DROPPED_MAX = 4  # tokens that may spell one character; as many are generated anew at most
CONTEXT_IDS = 8  # of the prompt, before the answer's: some tokenizers treat the first token of a text in their own way

# What a request for a chat may hold without a difference to an answer that has begun: its prompt is made of tokens now.
_OF_NO_EFFECT = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "n", "response_format", "stop", "logprobs", "top_logprobs"),
        *("max_tokens", "max_completion_tokens", "min_tokens", "include_stop_str_in_output", "return_token_ids"),
        *("frequency_penalty", "presence_penalty"),  # 0: else nobody goes on with it
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"),
        *("reasoning_effort", "include_reasoning", "chat_template", "chat_template_kwargs", "documents"),
        *("add_generation_prompt", "add_special_tokens", "parallel_tool_calls", "provider", "models"),
        *("prompt_cache_options", "prompt_cache_retention", "request_id", "session_id"),
    }
)
_CARRIED = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logit_bias"),
        *("stop_token_ids", "ignore_eos", "bad_words", "allowed_token_ids", "length_penalty", "priority"),
        *("skip_special_tokens", "spaces_between_special_tokens"),
    }
)
_NOTHING = (b"null", b"false", b"[]", b"{}")

_members = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.encode


class _Logprobs(Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(Struct):
    text: str = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: tuple[int, ...] | None = None


class _Completion(Struct):
    id: str | None = None
    choices: list[_Choice] = []
    error: Any = None


_completion = msgspec.json.Decoder(_Completion).decode


def why_not_exact(job: Job, request: Request) -> str | None:
    """Why the answer can't be gone on with behind its tokens; None if it can."""
    before = job.continuation
    if before is None or not before.token_ids or not before.prompt_token_ids:
        return "its tokens are not known"
    members = _members(job.body)
    tools = "tools" in members and bytes(members["tools"]) not in _NOTHING
    if tools and request.tool_choice != "none":
        return "a tool may be called, and that is read from the whole text"
    if request.stops and (request.min_tokens or 0) > len(before.token_ids):
        return "its stops don't count yet, and which token a text ends in isn't known"
    if not request.is_text:
        return "its prompt is more than tokens"
    for name, raw in members.items():
        if name not in _OF_NO_EFFECT | _CARRIED | {"tools", "tool_choice"} and bytes(raw) not in _NOTHING:
            return f"it is not known what {name} does to it"
    return None


def held_back(text: str, before: Continuation) -> str | None:
    """What of *text*, all that was generated, its client doesn't have; None if that can't be told, or ends in half a character."""
    at = 0
    if before.reasoning:
        at = text.find(before.text, len(before.reasoning))
        if not before.text.strip() or at != text.rfind(before.text):
            return None
    if at < 0 or not text.startswith(before.text, at):
        return None
    held = text[at + len(before.text) :]
    return None if held.endswith(HALF_CHARACTER) else held


@dataclass(frozen=True, slots=True)
class Seam:
    """Where the new engine begins: behind *ids*, the last *dropped* of which it generates anew; *held* is said first."""

    ids: tuple[int, ...]
    dropped: int
    held: str


def completion_body(
    job: Job, request: Request, seam: Seam, *, upstream_model: str, context_tokens: int
) -> bytes | None:
    """The request that goes on behind *seam*; None if there is no room for another token."""
    before = job.continuation
    assert before is not None  # noqa: S101 - a seam is one's
    prompt = before.prompt_token_ids + seam.ids
    room = context_tokens - len(prompt)
    wanted = room if request.limit is None else min(room, request.limit - len(seam.ids))
    if wanted < 1:
        return None
    members: dict[str, Any] = {name: raw for name, raw in _members(job.body).items() if name in _CARRIED}
    members |= {
        "model": upstream_model,
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "max_tokens": wanted,
    }
    if request.min_tokens:
        members["min_tokens"] = min(wanted, max(0, request.min_tokens - len(seam.ids)))
    if request.logprobs:
        members["logprobs"] = request.top_logprobs or 0
    return _encode(members)


class Completions:
    """Reads the stream of ``/v1/completions`` as the chunks of the chat that goes on."""

    def __init__(self, job: Job, request: Request, seam: Seam) -> None:
        before = job.continuation
        assert before is not None  # noqa: S101 - a seam is one's
        self.done = False
        self.generated: list[int] = []
        self._request = request
        self._skipped = seam.dropped
        self._prompt_tokens = len(before.prompt_token_ids) + len(seam.ids)
        self._scanner = StopScanner(
            request.stops, tail=before.text, held=seam.held, include=bool(request.include_stop_str_in_output)
        )

    def opening(self) -> Iterator[Chunk]:
        """What was held back, as far as it may be told now."""
        if text := self._scanner.feed(""):
            yield _chunk(text, None, Chunk(members=b""))

    def at_the_limit(self) -> Iterator[Chunk]:
        """The end of an answer that has all its tokens already."""
        self.done = True
        yield _chunk(self._scanner.end(), None, Chunk(members=b"", finish_reason="length"))
        yield self.usage()

    def event(self, data: bytes) -> Chunk | None:
        """Raises: Fault."""
        if data == DONE:
            return None
        try:
            said = _completion(data)
        except msgspec.MsgspecError as error:
            raise ProviderNonsense("The engine sent something that is not a completion.") from error
        if said.error is not None:
            raise refusal_inside(complaint_of({"error": said.error}))
        if not said.choices:
            return None
        choice = said.choices[0]
        if choice.finish_reason in GIVEN_UP:
            raise ProviderFailed(f"The provider gave the generation up (finish_reason {choice.finish_reason!r}).")
        ids = choice.token_ids or ()
        before, self.generated = len(self.generated), [*self.generated, *ids]
        text = self._scanner.feed(choice.text)
        finish, reason = choice.finish_reason, choice.stop_reason
        if self._scanner.found is not None:
            finish, reason = "stop", self._scanner.found
        elif finish is not None:
            text += self._scanner.end()
        self.done = finish is not None
        skipped = max(0, min(len(ids), self._skipped - before))
        logprobs = None if choice.logprobs is None else _logprobs(choice.logprobs, self._request.top_logprobs or 0)
        chunk = Chunk(
            members=b"",
            tokens=len(ids) - skipped,
            token_ids=ids[skipped:],
            finish_reason=finish,
            upstream_id=said.id,
        )
        if not text and finish is None and not chunk.tokens:
            return None
        return _chunk(text, None if logprobs is None else logprobs[skipped:], chunk, stop_reason=reason)

    @property
    def stop(self) -> str | None:
        """The stop sequence that has ended the answer."""
        return self._scanner.found

    def without_surplus(self, chunk: Chunk, surplus: int) -> Chunk:
        """The last *chunk* without its last *surplus* tokens, which the engine had generated behind the stop by then."""
        if not surplus:
            return chunk
        del self.generated[len(self.generated) - surplus :]
        kept = max(0, len(chunk.token_ids) - surplus)
        told = msgspec.json.decode(chunk.members or b"{}")
        for choice in told["choices"]:
            if choice["logprobs"] is not None:
                choice["logprobs"]["content"] = choice["logprobs"]["content"][:kept]
        return msgspec.structs.replace(chunk, members=_encode(told), tokens=kept, token_ids=chunk.token_ids[:kept])

    def usage(self) -> Chunk:
        """What the engine was asked to do, in tokens."""
        usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=len(self.generated))
        raw = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        }
        return Chunk(members=None, usage=usage, usage_raw=_encode(raw))


def _chunk(
    text: str, logprobs: list[dict[str, Any]] | None, like: Chunk, *, stop_reason: int | str | None = None
) -> Chunk:
    choice: dict[str, Any] = {
        "index": 0,
        "delta": {"content": text} if text or like.finish_reason is None else {},
        "logprobs": None if logprobs is None else {"content": logprobs},
        "finish_reason": like.finish_reason,
    }
    if like.finish_reason is not None:
        choice["stop_reason"] = stop_reason
    return msgspec.structs.replace(like, members=_encode({"choices": [choice]}))


def _logprobs(said: _Logprobs, top: int) -> list[dict[str, Any]]:
    """The same in the chat's shape."""
    tops = said.top_logprobs or [None] * len(said.tokens)
    return [
        {
            **_logprob(token, logprob),
            "top_logprobs": [_logprob(name, value) for name, value in list((others or {}).items())[:top]],
        }
        for token, logprob, others in zip(said.tokens, said.token_logprobs, tops, strict=True)
    ]


def _logprob(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}
