"""What an OpenAI-compatible server says, as chunks; pure, and the hottest code of a worker.

The choices and every member that we don't know are passed on byte for byte: they are cut out of the JSON, not rebuilt. Only
what has to be known is looked into: usage, finish reasons, and how much text there is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
from msgspec import Raw, Struct

from schemas.errors import Fault, ProviderFailed, ProviderNonsense
from schemas.money import Usage
from workers.providers.base import Chunk, joined
from workers.providers.habits import NULL, Habits
from workers.providers.openai_faults import complaint_of, refusal_inside
from workers.providers.sse import Event
from workers.providers.tokens import SHORT_DELTA_BYTES, estimate

TOKENS_MAX = 10**12  # a count beyond this is a mistake of the provider's
LOOKS_AROUND_MAX = 3  # in one answer, for what its events repeat
DONE = b"[DONE]"

_NULL = NULL  # itself: what isn't there is told by identity
_QUOTES_BYTES = 2
_HEAD = b'{"choices":'
_OURS = ("object", "created", "model", "obfuscation")  # the ingress pads by itself
_OF_NO_INTEREST = frozenset({"system_fingerprint", "service_tier"})  # when they come alone
GIVEN_UP = frozenset({"abort", "error"})  # how vLLM and SGLang end a generation that went wrong


class _Text(Struct, gc=False):
    """A delta or a message: where there may be text. As raw JSON, so that its shape is the provider's business."""

    content: Raw = _NULL
    reasoning_content: Raw = _NULL
    reasoning: Raw = _NULL  # some servers send the same under both names
    thinking: Raw = _NULL
    refusal: Raw = _NULL
    tool_calls: Raw = _NULL
    function_call: Raw = _NULL


class _Choice(Struct, gc=False):
    index: int = 0
    delta: _Text | None = None
    message: _Text | None = None
    finish_reason: str | None = None


class _Called(Struct, gc=False):
    name: Raw = _NULL
    arguments: Raw = _NULL
    input: Raw = _NULL


class _Call(Struct, gc=False):
    function: _Called | None = None
    custom: _Called | None = None


class _PromptDetails(Struct):
    cached_tokens: int | None = None
    audio_tokens: int | None = None


class _CompletionDetails(Struct):
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None
    prompt_cache_hit_tokens: int | None = None  # DeepSeek's name


_members = msgspec.json.Decoder(dict[str, Raw]).decode
_choices = msgspec.json.Decoder(list[_Choice]).decode
_calls = msgspec.json.Decoder(list[_Call]).decode
_called = msgspec.json.Decoder(_Called).decode
_usage = msgspec.json.Decoder(_Usage).decode
_text = msgspec.json.Decoder(str).decode
_anything = msgspec.json.Decoder().decode
_encode = msgspec.json.encode

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Around(NamedTuple):
    """What the events of an answer repeat: the bytes before and behind their choices.

    Where they stand around another list, that is the event's choices, and all its other members are those of the event that
    this was taken from: *behind* is what goes on of them, as JSON.
    """

    head: bytes
    tail: bytes
    behind: bytes


class ChunkReader:
    """Reads the answer to one request, in order: each event of a stream, or the one body."""

    def __init__(self) -> None:
        self.habits = Habits()
        self.done = False  # the provider said that nothing more comes
        self._open: set[int] = set()  # choices that have begun and not finished
        self._finished = False  # at least one choice has
        self._begun = False
        self._id_raw: Raw | None = None
        self._id: str | None = None
        self._fault: Fault | None = None
        self._around: Around | None = None
        self._looks_left = LOOKS_AROUND_MAX

    def events(self, events: Iterable[Event]) -> Chunk | None:
        """The chunks in *events*, which came together, as one; None if there is nothing in them for anybody.

        Ends where a fault does; `check_well` raises that.
        """
        chunks: list[Chunk] = []
        try:
            for name, data in events:
                chunk = self.event(name, data)
                if chunk is not None:
                    chunks.append(chunk)
                elif self.done:
                    break
        except Fault as fault:
            self._fault = fault
        return joined(chunks)

    def check_well(self) -> None:
        """Raises: the fault that the last `events` ended in."""
        if self._fault is not None:
            raise self._fault

    def event(self, name: bytes, data: bytes) -> Chunk | None:
        """The chunk in one event of a stream; None if there is nothing in it for anybody.

        Raises: ProviderNonsense if it isn't a chunk, another Fault if it is an error.
        """
        if data == DONE:
            self.done = True
            return None
        if self._around is not None and not name:
            head, tail, _ = self._around
            if data.startswith(head) and data.endswith(tail):
                chunk = self._again(data[len(head) : len(data) - len(tail)], self._around)
                if chunk is not None:
                    return chunk
        members = _object(data)
        if name == b"error":
            raise _fault(data)
        return self._chunk(members, data, streamed=True)

    def body(self, data: bytes) -> Chunk:
        """The chunk that a whole answer is.

        Raises: as `event`.
        """
        chunk = self._chunk(_object(data), data, streamed=False)
        if chunk is None or chunk.members is None or not self._begun:
            raise ProviderNonsense("The provider answered without choices.")
        return chunk

    def check_complete(self) -> None:
        """To be called at the end of a stream.

        Raises: ProviderFailed if it ended too early, ProviderNonsense if it never began.
        """
        if self.done and not self._begun:
            raise ProviderNonsense("The provider's stream had no choices.")
        if not self.done and not self.finished:
            raise ProviderFailed("The provider's answer ended early.")

    @property
    def finished(self) -> bool:
        """Every choice has its finish reason."""
        return self._finished and not self._open

    def _chunk(self, members: dict[str, Raw], data: bytes, *, streamed: bool, said: Raw | None = None) -> Chunk | None:
        """The chunk of *members*, which *data* has; *said* are its choices there, where those of *members* are others."""
        if "error" in members and bytes(members.pop("error")) != b"null":
            raise _fault(data)
        stated = members.pop("choices", None)
        if stated is None:
            raise _without_choices(members, data)
        raw_choices, choices = self._mended(stated, _read_choices(stated), streamed=streamed)
        upstream_id = self._upstream_id(members.pop("id", None))
        for name in _OURS:
            members.pop(name, None)
        usage, usage_raw = _read_usage(members.pop("usage", None))
        tokens, finish_reason = self._look(choices, streamed=streamed)
        if (
            not choices and usage is not None
        ):  # the report that we asked for: what else is in it has no place in the answer
            return Chunk(members=None, usage=usage, usage_raw=usage_raw, upstream_id=upstream_id)
        if not choices and _OF_NO_INTEREST.issuperset(members):
            return None
        behind = b"," + _encode(members)[1:] if members else b"}"
        if streamed and usage is None and self._looks_left:
            self._looks_left -= 1
            self._around = _around(data, bytes(stated if said is None else said), behind)
        return Chunk(
            members=_HEAD + raw_choices + behind,
            tokens=tokens if streamed or usage is None else usage.completion_tokens,
            finish_reason=finish_reason,
            usage=usage,
            usage_raw=usage_raw,
            upstream_id=upstream_id,
        )

    def _again(self, raw: bytes, around: Around) -> Chunk | None:
        """The chunk of an event with the choices *raw* in what is known; None if they need another look."""
        try:
            str(raw, "utf-8")
            choices = _choices(raw)
        except _NOT_JSON:
            return None
        if not choices:
            return None
        mended, choices = self._mended(raw, choices, streamed=True)
        tokens, finish_reason = self._look(choices, streamed=True)
        return Chunk(_HEAD + mended + around.behind, tokens, finish_reason, upstream_id=self._id)

    def _look(self, choices: list[_Choice], *, streamed: bool) -> tuple[int, str | None]:
        """About how many tokens *choices* bring, and the finish reason of the one with index 0. Raises: Fault."""
        finish_reason, tokens = None, 0
        for choice in choices:
            said = choice.delta if streamed else choice.message
            if said is None:
                if streamed and choice.finish_reason is not None:
                    said = _Text()
                else:
                    raise ProviderNonsense(f"The provider sent a choice without {'delta' if streamed else 'message'}.")
            tokens += _tokens(said, SHORT_DELTA_BYTES if streamed else 0)
            reason = choice.finish_reason
            self._begun = True
            if reason is None:
                self._open.add(choice.index)
                continue
            if reason in GIVEN_UP:
                raise ProviderFailed(f"The provider gave the generation up (finish_reason {reason!r}).")
            self._open.discard(choice.index)
            self._finished = True
            if choice.index == 0:
                finish_reason = reason
        return tokens, finish_reason

    def _mended(self, raw: bytes | Raw, choices: list[_Choice], *, streamed: bool) -> tuple[bytes | Raw, list[_Choice]]:
        """The same without the habits of servers that are almost compatible; hardly any chunk shows one."""
        for choice in choices:
            if self.habits.show(choice.delta if streamed else choice.message, choice.finish_reason):
                try:
                    raw = self.habits.mended(raw, streamed=streamed)
                except _NOT_JSON as error:
                    raise ProviderNonsense("The provider sent choices that are not a list of choices.") from error
                return raw, _read_choices(raw)
        return raw, choices

    def _upstream_id(self, raw: Raw | None) -> str | None:
        if raw is not None and raw != self._id_raw:
            self._id_raw = Raw(bytes(raw))  # a copy: the view would keep the whole chunk alive
            try:
                self._id = _text(raw)
            except msgspec.MsgspecError:
                self._id = None
        return self._id


def _around(data: bytes, choices: bytes, behind: bytes) -> Around | None:
    """What stands around the *choices* in *data*; None if that can't be told, because their bytes occur more than once."""
    if data.count(choices) != 1:
        return None
    head, _, tail = data.partition(choices)
    return Around(head, tail, behind)


def _object(data: bytes) -> dict[str, Raw]:
    try:
        str(data, "utf-8")  # what is cut out is not decoded any more, so this is where it is looked at
        return _members(data)
    except _NOT_JSON as error:
        raise ProviderNonsense("The provider sent something that is not a JSON object.") from error


def _fault(data: bytes) -> Exception:
    return refusal_inside(complaint_of(_anything(data)))


def _without_choices(members: dict[str, Raw], data: bytes) -> Exception:
    """VLLM's older error bodies have no ``error``: they are one."""
    if "object" in members and bytes(members["object"]) == b'"error"':
        return _fault(data)
    return ProviderNonsense("The provider answered without choices.")


def _read_choices(raw: bytes | Raw) -> list[_Choice]:
    try:
        return _choices(raw)
    except _NOT_JSON as error:
        raise ProviderNonsense("The provider sent choices that are not a list of choices.") from error


def _read_usage(raw: Raw | None) -> tuple[Usage | None, bytes | None]:
    """A usage that can't be true, or isn't one, counts as none."""
    if raw is None or raw == _NULL:
        return None, None
    try:
        stated = _usage(raw)
    except _NOT_JSON:
        return None, None
    prompt, completion = stated.prompt_tokens, stated.completion_tokens
    if prompt is None and completion is None:
        return None, None
    ins, outs = (
        stated.prompt_tokens_details or _PromptDetails(),
        stated.completion_tokens_details or _CompletionDetails(),
    )
    usage = Usage(
        prompt_tokens=prompt or 0,
        completion_tokens=completion or 0,
        cached_tokens=ins.cached_tokens or stated.prompt_cache_hit_tokens or 0,
        reasoning_tokens=outs.reasoning_tokens or 0,
        audio_prompt_tokens=ins.audio_tokens or 0,
        audio_completion_tokens=outs.audio_tokens or 0,
    )
    if not all(0 <= count <= TOKENS_MAX for count in msgspec.structs.astuple(usage)):
        return None, None
    return usage, bytes(raw)


def _tokens(said: _Text, short: int) -> int:
    """About how many tokens this much text is; exact for an engine that sends a chunk, of *short* bytes at most, for each."""
    count = 0 if said.content is _NULL else estimate(_size(said.content), short)
    if said.reasoning_content is not _NULL:  # whatever name it came under: see habits.py
        count += estimate(_size(said.reasoning_content), short)
    if said.refusal is not _NULL:
        count += estimate(_size(said.refusal), short)
    if said.tool_calls is not _NULL or said.function_call is not _NULL:
        count += _called_tokens(said, short)
    return count


def _called_tokens(said: _Text, short: int) -> int:
    try:
        calls = [] if said.tool_calls == _NULL else _calls(said.tool_calls)
        called = [call.function or call.custom for call in calls]
        called += [] if said.function_call == _NULL else [_called(said.function_call)]
    except _NOT_JSON:  # a shape of its own: go by its length
        return estimate(_size(said.tool_calls) + _size(said.function_call), short)
    return sum(
        estimate(_size(each.name), short) + estimate(_size(each.arguments), short) + estimate(_size(each.input), short)
        for each in called
        if each is not None
    )


def _size(raw: Raw) -> int:
    """Bytes of a text, as JSON writes them; 0 for null."""
    return 0 if raw is _NULL or raw == _NULL else len(memoryview(raw)) - _QUOTES_BYTES
