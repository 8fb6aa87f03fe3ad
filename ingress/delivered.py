"""What an answer has told its client so far, as far as another worker needs it to go on behind it.

What can't be gone on with is known here first: see `why_not`. It costs a look into every chunk of a stream, and memory up
to `TEXT_MAX_BYTES` and `IDS_MAX` for each.
Source: docs/adr/0066-continuation.md
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec
from msgspec import Raw, Struct

from schemas.chat import ChatRequest
from schemas.frames import Delta, Finished
from schemas.jobs import Continuation

TEXT_MAX_BYTES = 512 * 1024  # a longer answer is not continued
IDS_MAX = 128 * 1024  # one of more tokens is continued behind its text

_NULL = Raw(b"null")
_EMPTY = (b"null", b'""', b"[]", b"{}")


class _Said(Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: Raw = _NULL
    tool_calls: Raw = _NULL
    function_call: Raw = _NULL
    audio: Raw = _NULL


class _Choice(Struct, gc=False):
    delta: _Said | None = None
    finish_reason: str | None = None


class _Chunk(Struct, gc=False):
    choices: list[_Choice] = []


_chunk = msgspec.json.Decoder(_Chunk).decode
_members = msgspec.json.Decoder(dict[str, Raw]).decode

# Members by which engines are bound to a grammar. It would begin anew in the middle of the answer.
_GRAMMARS = frozenset(
    {
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "grammar",
        "json_schema",
        "regex",
        "ebnf",
    }
)


class Delivered:
    """Of one request, over all its attempts."""

    def __init__(self, request: ChatRequest, body: bytes) -> None:
        self.tokens = 0  # completion tokens, as the workers count them
        self.finish_reason: str | None = None  # once the client has it, the answer is complete
        self._request = request
        self._body = body
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._bytes = 0
        self._ids = array("I")
        self._prompt_ids: tuple[int, ...] = ()
        self._ids_known = True
        self._odd: str | None = None if request.stream else "it is not streamed"

    def add(self, frame: Delta | Finished) -> None:
        """The chunks of *frame* go to the client."""
        self.tokens += frame.tokens
        if self._odd is not None:
            return
        self._add_ids(frame)
        for chunk in frame.chunks:
            self._bytes += memoryview(chunk).nbytes
            self._look(chunk)
        if self._bytes > TEXT_MAX_BYTES:
            self._forget("it is too long")

    def why_not(self) -> str | None:
        """Why nobody may go on with this answer; None if somebody may."""
        if self._odd is not None:
            return self._odd
        request = self._request
        if request.n > 1:
            return "it has several choices"
        if request.frequency_penalty or request.presence_penalty:
            return "its penalties count the tokens of one engine"
        return _bound(self._body)

    def continuation(self, *, exact: bool) -> Continuation:
        """What the next worker is told: the tokens only for one that is known to be the same model, *exact*."""
        exact = exact and self.has_ids
        return Continuation(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            tokens=self.tokens,
            token_ids=tuple(self._ids) if exact else (),
            prompt_token_ids=self._prompt_ids if exact else (),
        )

    @property
    def has_ids(self) -> bool:
        """Whether every token has its id."""
        return self._ids_known and len(self._ids) == self.tokens > 0

    @property
    def prompt_tokens(self) -> int | None:
        """Where the engine's own ids tell it."""
        return len(self._prompt_ids) or None

    def _add_ids(self, frame: Delta | Finished) -> None:
        if frame.prompt_token_ids and not self._prompt_ids:
            self._prompt_ids = frame.prompt_token_ids
        if len(frame.token_ids) != frame.tokens or len(self._ids) > IDS_MAX:
            self._ids_known = False
        if self._ids_known:
            self._ids.extend(frame.token_ids)

    def _look(self, raw: Raw) -> None:
        try:
            choices = _chunk(raw).choices
        except msgspec.MsgspecError:
            self._forget("a part of it can't be read")
            return
        for choice in choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.delta is not None:
                self._take(choice.delta)

    def _take(self, said: _Said) -> None:
        if said.content:
            self._text.append(said.content)
        if said.reasoning or said.reasoning_content:
            self._reasoning.append(said.reasoning or said.reasoning_content or "")
        if _any((said.tool_calls, said.function_call)):
            self._forget("it calls a tool")
        elif _any((said.refusal, said.audio)):
            self._forget("it is more than text")

    def _forget(self, why: str) -> None:
        self._odd = why
        self._text, self._reasoning, self._ids, self._prompt_ids = [], [], array("I"), ()
        self._ids_known = False


def _any(raws: Iterable[Raw]) -> bool:
    return any(raw is not _NULL and bytes(raw) not in _EMPTY for raw in raws)


def _bound(body: bytes) -> str | None:
    """Why a body with members like these binds its answer to a form."""
    members = _members(body)
    if any(bytes(raw) not in _EMPTY for name, raw in members.items() if name in _GRAMMARS):
        return "its form is prescribed"
    form = members.get("response_format", _NULL)
    if bytes(form) == b"null" or bytes(_members(form).get("type", _NULL)) == b'"text"':
        return None
    return "its form is prescribed"
