"""What a chat completion request may ask for besides its messages: tools, formats, audio, moderation and the like.

Values that differ between providers or grow with every release (voices, efforts, tiers, modes) are plain strings here. A
tool, a choice or a format of a type that is not documented is an `Other`, as in schemas/messages.py.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from schemas.messages import Content, Other


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Voice(Struct, frozen=True, kw_only=True):
    id: str


class AudioOutput(Struct, frozen=True, kw_only=True):
    format: str
    voice: str | Voice


class FunctionDefinition(Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON Schema
    strict: bool | None = None


class FunctionTool(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    function: FunctionDefinition


class Grammar(Struct, frozen=True, kw_only=True):
    definition: str
    syntax: str  # lark | regex


class CustomFormat(Struct, frozen=True, kw_only=True):
    type: str  # text | grammar
    grammar: Grammar | None = None


class CustomDefinition(Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    format: CustomFormat | None = None


class CustomTool(Struct, frozen=True, kw_only=True, tag_field="type", tag="custom"):
    custom: CustomDefinition


Tool = FunctionTool | CustomTool | Other


class Named(Struct, frozen=True, kw_only=True):
    name: str


class FunctionChoice(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    function: Named


class CustomChoice(Struct, frozen=True, kw_only=True, tag_field="type", tag="custom"):
    custom: Named


class AllowedTools(Struct, frozen=True, kw_only=True):
    mode: str  # auto | required
    tools: tuple[dict[str, Any], ...]


class AllowedToolsChoice(Struct, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


ToolChoice = FunctionChoice | CustomChoice | AllowedToolsChoice | Other


class TextFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    pass


class JsonSchema(Struct, frozen=True, kw_only=True):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | Other


class Prediction(Struct, frozen=True, kw_only=True):
    type: str
    content: Content


class ModerationMode(Struct, frozen=True, kw_only=True):
    mode: str  # score | block


class ModerationPolicy(Struct, frozen=True, kw_only=True):
    input: ModerationMode | None = None
    output: ModerationMode | None = None


class Moderation(Struct, frozen=True, kw_only=True):
    model: str
    policy: ModerationPolicy | None = None


class PromptCacheOptions(Struct, frozen=True, kw_only=True):
    mode: str | None = None  # implicit | explicit
    ttl: str | None = None


class ApproximateLocation(Struct, frozen=True, kw_only=True):
    city: str | None = None
    country: str | None = None
    region: str | None = None
    timezone: str | None = None


class UserLocation(Struct, frozen=True, kw_only=True):
    type: str
    approximate: ApproximateLocation


class WebSearchOptions(Struct, frozen=True, kw_only=True):
    search_context_size: str | None = None
    user_location: UserLocation | None = None
