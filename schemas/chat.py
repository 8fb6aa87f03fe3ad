"""POST /v1/chat/completions as the API stands: the request in full, and how a body becomes one or is refused.

The Struct is for checking a body and for what the ingress must know of it. The body itself travels on untouched, with the
fields and types that nobody has heard of yet: what is not documented is never refused here (ADR 0030). Nor are ranges that
differ from provider to provider; where the API takes an optional field, null is taken too.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct, field

from schemas.errors import BadRequest
from schemas.messages import Message, Part, ToolCall, tags_of
from schemas.options import (
    AudioOutput,
    FunctionDefinition,
    Moderation,
    Named,
    Prediction,
    PromptCacheOptions,
    ResponseFormat,
    StreamOptions,
    Tool,
    ToolChoice,
    WebSearchOptions,
)
from schemas.refusals import broken, refusal
from schemas.routing import Models, Preferences

Count = Annotated[int, Meta(ge=0)]
Choices = Annotated[int, Meta(ge=1, le=128)]


class ChatRequest(Struct, frozen=True, kw_only=True):
    """A chat completion request. ``messages`` is the client's JSON, already checked; hash it as it is."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Raw
    audio: AudioOutput | None = None
    frequency_penalty: float | None = None
    function_call: str | Named | None = None
    functions: tuple[FunctionDefinition, ...] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    metadata: dict[str, str] | None = None
    modalities: tuple[str, ...] | None = None
    moderation: Moderation | None = None
    given_n: Choices | None = field(default=None, name="n")
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    presence_penalty: float | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    seed: int | None = None
    service_tier: str | None = None
    stop: str | tuple[str, ...] | None = None
    store: bool | None = None
    given_stream: bool | None = field(default=None, name="stream")
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    tool_choice: str | ToolChoice | None = None
    tools: tuple[Tool, ...] | None = None
    top_logprobs: Count | None = None
    top_p: float | None = None
    user: str | None = None
    verbosity: str | None = None
    web_search_options: WebSearchOptions | None = None
    provider: Preferences | None = None  # this and the next are for us: they travel no further
    models: Models | None = None  # to fall back on, in this order

    @property
    def messages_raw(self) -> bytes:
        """The messages byte for byte as sent; a copy, where a hash could read ``messages`` itself."""
        return bytes(self.messages)

    @property
    def stream(self) -> bool:
        return self.given_stream is True

    @property
    def n(self) -> int:
        return 1 if self.given_n is None else self.given_n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage: only when asked for."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def include_obfuscation(self) -> bool:
        """Whether a stream's chunks are padded against the guessing of tokens by their length: unless refused."""
        return self.stream_options is None or self.stream_options.include_obfuscation is not False

    @property
    def max_output_tokens(self) -> int | None:
        """The most tokens of each choice: the new name wins over the old one; None is no limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class _OnlyMessages(Struct, frozen=True):
    messages: Raw


OURS = frozenset({"provider", "models"})
_EVERYWHERE = frozenset(
    {"model", "messages", "stream", "stream_options"}
)  # every provider takes these, or we tell them

_members = msgspec.json.Decoder(dict[str, Raw]).decode
_request = msgspec.json.Decoder(ChatRequest).decode
_messages = msgspec.json.Decoder(tuple[Message, ...]).decode
_only_messages = msgspec.json.Decoder(_OnlyMessages).decode
_anything = msgspec.json.Decoder().decode

_ROLES = {"role": tags_of(Message)}


def decode_request(body: bytes) -> ChatRequest:
    """The request in *body*.

    Raises: BadRequest with a sentence for its sender and, where one is to blame, the parameter's name.
    """
    if not body or body.isspace():
        raise BadRequest("The request body is empty. Send a JSON object with 'model' and 'messages'.")
    _check_utf8(body)
    try:
        request = _decode_body(body)
        messages = _decode_messages(request.messages)
    except RecursionError as error:
        raise BadRequest("The request body is nested too deeply.") from error
    if not messages:
        raise BadRequest("Invalid value for 'messages': expected at least one message.", param="messages")
    if request.provider is not None:
        request.provider.check()
    return request


def for_providers(body: bytes) -> bytes:
    """*body*, which was decoded before, without the members that were for us alone."""
    members = _members(body)
    for name in OURS:
        members.pop(name, None)
    return msgspec.json.encode(members)


def parameters_of(body: bytes) -> frozenset[str]:
    """The names of the members of *body*, which was decoded before, that a provider has to honour."""
    return frozenset(name for name, value in _members(body).items() if bytes(value) != b"null") - OURS - _EVERYWHERE


def _decode_body(body: bytes) -> ChatRequest:
    try:
        return _request(body)
    except msgspec.ValidationError as error:
        return _decode_open_body(body, error)
    except msgspec.DecodeError as error:
        raise broken(error) from error


def _decode_messages(raw: Raw) -> tuple[Message, ...]:
    try:
        return _messages(raw)
    except msgspec.ValidationError as error:
        return _decode_open_messages(raw, error)
    except msgspec.DecodeError as error:
        raise broken(error) from error


def _decode_open_body(body: bytes, first: msgspec.ValidationError) -> ChatRequest:
    """Looks again, more slowly, at what failed *first*: perhaps only because of a type that is not documented."""
    tree = _tree(body, first, at="")
    if isinstance(tree, dict):
        _name_first_model(tree)
        _open(tree, "tools", Tool)
        _open(tree, "tool_choice", ToolChoice)
        _open(tree, "response_format", ResponseFormat)
        if isinstance(prediction := tree.get("prediction"), dict):
            _open(prediction, "content", Part)
        if "messages" in tree:
            tree["messages"] = _only_messages(body).messages
    try:
        return msgspec.convert(tree, ChatRequest)
    except msgspec.ValidationError as error:
        raise refusal(error) from error


def _decode_open_messages(raw: Raw, first: msgspec.ValidationError) -> tuple[Message, ...]:
    """As `_decode_open_body`."""
    tree = _tree(raw, first, at="messages")
    for message in tree if isinstance(tree, list) else ():
        if isinstance(message, dict):
            _open(message, "content", Part)
            _open(message, "tool_calls", ToolCall)
    try:
        return msgspec.convert(tree, tuple[Message, ...])
    except msgspec.ValidationError as error:
        raise refusal(error, at="messages", values=_ROLES) from error


def _tree(raw: bytes | Raw, first: msgspec.ValidationError, *, at: str) -> Any:
    try:
        return _anything(raw)
    except msgspec.ValidationError as error:  # a number beyond a double's range; *first* knows where
        raise refusal(first, at=at, values=_ROLES) from error
    except msgspec.DecodeError as error:
        raise broken(error) from error


def _check_utf8(body: bytes) -> None:
    """The decoder checks only the strings that it decodes, but the others travel on too."""
    if body.isascii():
        return
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"The request body is not valid UTF-8 (byte {error.start}).") from error


def _open(holder: dict[str, Any], name: str, union: Any) -> None:
    """Puts `Other` in place of what has a type that *union* doesn't know, so that the rest can still be checked."""
    known = tags_of(union)
    match holder.get(name):
        case list(items):
            holder[name] = [_or_other(item, known) for item in items]
        case item:
            if name in holder:
                holder[name] = _or_other(item, known)


def _name_first_model(tree: dict[str, Any]) -> None:
    """``models`` alone will do: its first is the one that is asked for."""
    match tree.get("models"):
        case [str(first), *_] if "model" not in tree:
            tree["model"] = first


def _or_other(item: Any, known: tuple[str, ...]) -> Any:
    undocumented = isinstance(item, dict) and isinstance(item.get("type"), str) and item["type"] not in known
    return {"type": "other"} if undocumented else item
