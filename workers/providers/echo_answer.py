"""What `echo` says to a request: pure, and the same each time.

The last user message's text; a tool call when tools are given; a document when a JSON schema is. Tool loops end: after a
tool's result comes text, unless a tool call is required.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import Struct

from schemas.errors import ProviderRejected
from workers.providers.schema_fill import fill
from workers.providers.schema_walk import Unfillable
from workers.providers.tokens import count, split

CHOICES_MAX = 128
ANSWER_TOKENS_MAX = 16 * 1024  # of all choices together: a longer answer ends with finish_reason "length"
SEARCHED_CHARS_MAX = 100_000  # of a message, for the names of tools
SCHEMA_BYTES_MAX = 512 * 1024
KIND_CHARS_MAX = 40  # of an unknown content part's type

Kind = Literal["function", "custom", "legacy"]


class Message(Struct, frozen=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    refusal: str | None = None


class Request(Struct, frozen=True):
    """The members that `echo` acts on."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def limit(self) -> int:
        """The tokens that each choice may have."""
        stated = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        most = ANSWER_TOKENS_MAX // self.choices
        return most if stated is None else min(stated, most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call of a tool; *pieces* are its arguments (the input of a custom tool) in tokens."""

    kind: Kind
    name: str
    pieces: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Either *calls* or *text*, in tokens. A call's name counts as one token."""

    calls: list[Call]
    text: list[str]
    finish_reason: str
    choices: int
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return self.choices * (len(self.text) + sum(1 + len(call.pieces) for call in self.calls))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tool:
    kind: Kind
    name: str
    parameters: dict[str, Any] | bool | None


_decode = msgspec.json.Decoder(Request).decode


def read(body: bytes | msgspec.Raw) -> Request:
    """Raises: ProviderRejected if *body* is not a request for a chat completion."""
    try:
        request = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _rejected(f"The body is not a chat completion request: {error}") from error
    if not request.messages:
        raise _rejected("messages must not be empty", param="messages")
    if not 1 <= request.choices <= CHOICES_MAX:
        raise _rejected(f"n must be 1 to {CHOICES_MAX}", param="n")
    if request.limit < 0:
        raise _rejected("max_completion_tokens must not be negative", param="max_completion_tokens")
    return request


def answer(request: Request) -> Answer:
    """Raises: ProviderRejected if a tool is asked for that isn't there, or a schema can't be filled."""
    finish: str
    calls, text = _calls(request), []
    if calls:
        finish = "function_call" if calls[0].kind == "legacy" else "tool_calls"
        calls, whole = _first_tokens(calls, request.limit)
    else:
        said = _cut(_said(request), request.stop)
        text = split(said, most=request.limit)
        finish, whole = "stop", sum(map(len, text)) == len(said)
    return Answer(
        calls=calls,
        text=text,
        finish_reason=finish if whole else "length",
        choices=request.choices,
        prompt_tokens=sum(_prompt_tokens(message) for message in request.messages),
    )


def _said(request: Request) -> str:
    form = request.response_format or {}
    match form.get("type"):
        case "json_schema":
            stated = form.get("json_schema")
            schema = stated.get("schema") if isinstance(stated, dict) else None
            return _document(schema, "text", param="response_format.json_schema.schema")
        case "json_object":
            return _json({"echo": _text(_speaker(request))})
        case _:
            return _text(_speaker(request))


def _speaker(request: Request) -> Message:
    """Whose text is echoed: a tool's result if it came last, else the last user, else whoever said something last."""
    last = request.messages[-1]
    if last.role in ("tool", "function"):
        return last
    users = (message for message in reversed(request.messages) if message.role == "user")
    return next(users, last)


def _text(message: Message) -> str:
    if isinstance(message.content, list):
        return " ".join(_part(part) for part in message.content)
    return message.content or message.refusal or ""


def _part(part: dict[str, Any]) -> str:
    match part.get("type"):
        case "text" | "refusal" as kind:
            return str(part.get(kind, ""))
        case "image_url":
            return "[image]"
        case "input_audio":
            return "[audio]"
        case kind:
            return f"[{str(kind)[:KIND_CHARS_MAX]}]"


def _cut(text: str, stop: str | list[str] | None) -> str:
    """*text* up to the first of *stop* that is in it."""
    signs = [stop] if isinstance(stop, str) else stop or []
    places = [place for sign in signs if sign and (place := text.find(sign)) >= 0]
    return text[: min(places)] if places else text


def _prompt_tokens(message: Message) -> int:
    called = (call.get("function") or call.get("custom") or {} for call in message.tool_calls or ())
    return count(_text(message)) + sum(
        count(str(call.get("arguments") or call.get("input") or "")) for call in called if isinstance(call, dict)
    )


def _first_tokens(calls: list[Call], limit: int) -> tuple[list[Call], bool]:
    """As much of *calls* as *limit* tokens hold, and whether that is all."""
    kept: list[Call] = []
    for call in calls:
        if limit < 1:
            return kept, False
        kept.append(Call(kind=call.kind, name=call.name, pieces=call.pieces[: limit - 1]))
        limit -= 1 + len(call.pieces)
    return kept, limit >= 0


def _calls(request: Request) -> list[Call]:
    if request.tools:
        tools = [_tool(tool) for tool in request.tools]
        chosen = _chosen(request, tools, request.tool_choice, param="tool_choice")
    elif request.functions:
        tools = [_function(function, kind="legacy") for function in request.functions]
        chosen = _chosen(request, tools, request.function_call, param="function_call")[:1]
    else:
        return []
    return [_call(tool, _text(_speaker(request))) for tool in chosen]


def _chosen(request: Request, tools: list[_Tool], choice: str | dict[str, Any] | None, *, param: str) -> list[_Tool]:
    match choice:
        case "none":
            return []
        case "required":
            return _named_in_text(request, tools) or [_next_uncalled(request, tools)]
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(allowed)}}:
            names = {_tool(tool).name for tool in allowed if isinstance(tool, dict)}
            return _chosen(request, [tool for tool in tools if tool.name in names], str(mode), param=param)
        case {"function": {"name": name}} | {"custom": {"name": name}} | {"name": name}:
            named = [tool for tool in tools if tool.name == name]
            if not named:
                raise _rejected(f"{param} names a tool that is not among the tools", param=param)
            return named[:1]
        case _:
            if request.messages[-1].role != "user":
                return []
            return _named_in_text(request, tools) or tools[:1]


def _named_in_text(request: Request, tools: list[_Tool]) -> list[_Tool]:
    """The tools that a last user message names, in its order; one at most if calls may not be parallel."""
    if request.messages[-1].role != "user":
        return []
    text = _text(request.messages[-1])[:SEARCHED_CHARS_MAX]
    found = {tool.name: re.search(rf"(?<!\w){re.escape(tool.name)}(?!\w)", text) for tool in tools if tool.name}
    places = {name: match.start() for name, match in found.items() if match}
    named = sorted((tool for tool in tools if tool.name in places), key=lambda tool: places[tool.name])
    return named[:1] if request.parallel_tool_calls is False else named


def _next_uncalled(request: Request, tools: list[_Tool]) -> _Tool:
    """The first tool not called since the user spoke, so that a loop which requires a call each turn gets to the last one."""
    called: set[object] = set()
    for message in reversed(request.messages):
        if message.role == "user":
            break
        for call in message.tool_calls or ():
            inner = call.get("function") or call.get("custom")
            called.add(inner.get("name") if isinstance(inner, dict) else None)
    if not tools:
        raise _rejected("a tool call is required, but no tool is allowed", param="tool_choice")
    return next((tool for tool in tools if tool.name not in called), tools[-1])


def _tool(tool: dict[str, Any]) -> _Tool:
    inner = tool.get("custom") if tool.get("type") == "custom" else tool.get("function")
    if not isinstance(inner, dict):
        raise _rejected("a tool must have a 'function' or be of type 'custom'", param="tools")
    return _function(inner, kind="custom" if tool.get("type") == "custom" else "function")


def _function(function: dict[str, Any], *, kind: Kind) -> _Tool:
    return _Tool(kind=kind, name=str(function.get("name", "")), parameters=function.get("parameters"))


def _call(tool: _Tool, text: str) -> Call:
    said = text if tool.kind == "custom" else _document(tool.parameters, tool.name, param="tools")
    return Call(kind=tool.kind, name=tool.name, pieces=split(said, most=ANSWER_TOKENS_MAX))


def _document(schema: Any, name: str, *, param: str) -> str:
    """JSON that is valid against *schema*; an empty object where there is none."""
    if schema is None or schema == {}:
        return "{}"
    if not isinstance(schema, dict | bool):
        raise _rejected("a schema must be an object", param=param)
    if len(msgspec.json.encode(schema)) > SCHEMA_BYTES_MAX:
        raise _rejected(f"a schema must have at most {SCHEMA_BYTES_MAX} bytes", param=param)
    try:
        return _json(fill(schema, name=name))
    except Unfillable as error:
        raise _rejected(str(error), param=param) from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _rejected(message: str, *, param: str | None = None) -> ProviderRejected:
    return ProviderRejected(message, status=400, type_="invalid_request_error", param=param)
