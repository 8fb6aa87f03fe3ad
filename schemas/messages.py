"""What a conversation is made of, as clients send it: messages, the parts of their content, and tool calls.

Every documented field is typed; fields nobody has heard of yet are ignored here and travel on in the raw body. A part or
a tool call of a type that this release doesn't know is an `Other`: schemas/chat.py puts it there, see ADR 0030. Where the
API takes an optional field, null is taken too, because the SDKs' own answers, sent back as messages, hold nulls.
"""

from __future__ import annotations

from typing import Any, get_args

from msgspec import Struct


class Other(Struct, frozen=True, kw_only=True, tag_field="type", tag="other"):
    """Something of a type that is not documented (yet). It passes untouched; the provider decides."""


class CacheBreakpoint(Struct, frozen=True, kw_only=True):
    """The prompt is cached up to the part that holds this."""

    mode: str
    ttl: str | None = None


class _Part(Struct, frozen=True, kw_only=True, tag_field="type"):
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class TextPart(_Part, frozen=True, kw_only=True, tag="text"):
    text: str


class ImageUrl(Struct, frozen=True, kw_only=True):
    url: str  # an address, or data:image/…;base64,…
    detail: str | None = None


class ImagePart(_Part, frozen=True, kw_only=True, tag="image_url"):
    image_url: ImageUrl


class InputAudio(Struct, frozen=True, kw_only=True):
    data: str  # base64
    format: str


class AudioPart(_Part, frozen=True, kw_only=True, tag="input_audio"):
    input_audio: InputAudio


class FileContent(Struct, frozen=True, kw_only=True):
    file_data: str | None = None  # base64
    file_id: str | None = None
    filename: str | None = None


class FilePart(_Part, frozen=True, kw_only=True, tag="file"):
    file: FileContent


class RefusalPart(_Part, frozen=True, kw_only=True, tag="refusal"):
    refusal: str


Part = TextPart | ImagePart | AudioPart | FilePart | RefusalPart | Other
Content = str | tuple[Part, ...]


class FunctionCall(Struct, frozen=True, kw_only=True):
    name: str
    arguments: str  # JSON as the model wrote it, so perhaps not valid


class FunctionToolCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    id: str
    function: FunctionCall


class CustomCall(Struct, frozen=True, kw_only=True):
    name: str
    input: str


class CustomToolCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="custom"):
    id: str
    custom: CustomCall


ToolCall = FunctionToolCall | CustomToolCall | Other


class AudioReference(Struct, frozen=True, kw_only=True):
    """An earlier answer's audio."""

    id: str


class _Message(Struct, frozen=True, kw_only=True, tag_field="role"):
    name: str | None = None


class DeveloperMessage(_Message, frozen=True, kw_only=True, tag="developer"):
    content: Content


class SystemMessage(_Message, frozen=True, kw_only=True, tag="system"):
    content: Content


class UserMessage(_Message, frozen=True, kw_only=True, tag="user"):
    content: Content


class AssistantMessage(_Message, frozen=True, kw_only=True, tag="assistant"):
    content: Content | None = None
    refusal: str | None = None
    audio: AudioReference | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    function_call: FunctionCall | None = None


class ToolMessage(_Message, frozen=True, kw_only=True, tag="tool"):
    tool_call_id: str
    content: Content


class FunctionMessage(Struct, frozen=True, kw_only=True, tag_field="role", tag="function"):
    """The old form of a tool's answer."""

    name: str
    content: str | None


Message = DeveloperMessage | SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage


def tags_of(union: Any) -> tuple[str, ...]:
    """The tags of a union of tagged Structs, in its order, less that of `Other`."""
    return tuple(str(member.__struct_config__.tag) for member in get_args(union) if member is not Other)
