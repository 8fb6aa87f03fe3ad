"""What the API answers: completions, chunks, models and errors, as clients see them.

The service itself writes most of these from raw parts (ingress/sse.py, ingress/answer.py) so that what providers add passes
untouched; these Structs are the documentation and what the tests decode answers with.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from schemas.messages import CustomToolCall, FunctionCall, FunctionToolCall


class TopLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: tuple[int, ...] | None = None


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    top_logprobs: tuple[TopLogprob, ...]


class Logprobs(Struct, frozen=True, kw_only=True):
    content: tuple[TokenLogprob, ...] | None = None
    refusal: tuple[TokenLogprob, ...] | None = None


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None
    image_tokens: int | None = None
    text_tokens: int | None = None


class CompletionTokensDetails(Struct, frozen=True, kw_only=True):
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None
    text_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class CompletionUsage(Struct, frozen=True, kw_only=True):
    """Tokens as clients see them; the details are parts of the totals."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class UrlCitation(Struct, frozen=True, kw_only=True):
    url: str
    title: str
    start_index: int
    end_index: int


class Annotation(Struct, frozen=True, kw_only=True):
    type: Literal["url_citation"]
    url_citation: UrlCitation


class AnswerAudio(Struct, frozen=True, kw_only=True):
    id: str
    data: str  # base64
    expires_at: int  # Unix seconds
    transcript: str


class AnswerMessage(Struct, frozen=True, kw_only=True):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    annotations: tuple[Annotation, ...] | None = None
    audio: AnswerAudio | None = None
    function_call: FunctionCall | None = None
    tool_calls: tuple[FunctionToolCall | CustomToolCall, ...] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class Choice(Struct, frozen=True, kw_only=True):
    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """The answer to a request without streaming."""

    id: str
    object: Literal["chat.completion"]
    created: int  # Unix seconds
    model: str
    choices: tuple[Choice, ...]
    usage: CompletionUsage | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None


class FunctionCallDelta(Struct, frozen=True, kw_only=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta | None = None


class AudioDelta(Struct, frozen=True, kw_only=True):
    id: str | None = None
    data: str | None = None
    expires_at: int | None = None
    transcript: str | None = None


class Delta(Struct, frozen=True, kw_only=True):
    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    audio: AudioDelta | None = None
    function_call: FunctionCallDelta | None = None
    tool_calls: tuple[ToolCallDelta, ...] | None = None


class ChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None


class ChatCompletionChunk(Struct, frozen=True, kw_only=True):
    """One event of a stream. All chunks have the same id and created."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int  # Unix seconds
    model: str
    choices: tuple[ChunkChoice, ...]  # empty in the chunk of usage
    usage: CompletionUsage | None = None
    obfuscation: str | None = None
    service_tier: str | None = None
    system_fingerprint: str | None = None


class ErrorDetail(Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Struct, frozen=True, kw_only=True):
    """Every error of the API, also inside a stream."""

    error: ErrorDetail


class Model(Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int  # Unix seconds
    owned_by: str


class ModelList(Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: tuple[Model, ...]


class ModelDeleted(Struct, frozen=True, kw_only=True):
    """What DELETE of a model says. Models are routes here and not deleted by clients: *deleted* is always false."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = False
