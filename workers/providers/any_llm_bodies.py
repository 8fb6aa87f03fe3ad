"""Requests as any-llm takes them, and its answers as OpenAI's API has them; pure.

What a wire can't do is refused with the parameter's name, not left out, where it would change the answer. Messages are put into
the shapes that any-llm reads on every wire.
Source: docs/adr/0045-own-wires.md
"""

from __future__ import annotations

from typing import Any

import msgspec

from schemas.errors import ProviderRejected
from schemas.jobs import Job
from schemas.providers import Wire

_BOTH = frozenset(
    {"tools", "tool_choice", "temperature", "top_p", "max_tokens", "stop", "response_format", "reasoning_effort"}
)
TAKEN: dict[Wire, frozenset[str]] = {
    "anthropic": _BOTH | {"parallel_tool_calls"},
    "gemini": _BOTH | {"presence_penalty", "frequency_penalty", "seed"},
}
# These ask for nothing that the answer would show.
_OF_NO_EFFECT = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "user", "store", "metadata", "service_tier", "seed"),
        *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "max_completion_tokens"),
    }
)
# And these don't either, with these values.
_USUAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "functions": ([],),
    "verbosity": ("medium",),
}
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def honoured(wire: Wire) -> tuple[str, ...]:
    """The parameters that can be said on *wire*."""
    return tuple(sorted(TAKEN[wire] | {"max_completion_tokens"}))


def question(job: Job, wire: Wire) -> dict[str, Any]:
    """The keyword arguments for any-llm, less the model.

    Raises: ProviderRejected if the body can't be said on this wire.
    """
    try:
        body = msgspec.json.decode(job.body)
    except _NOT_JSON as error:
        raise _rejected("The body is not a JSON object.") from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise _rejected("The body is not a JSON object with messages.")
    asked: dict[str, Any] = {"messages": [_message(message) for message in body["messages"]]}
    for name, value in body.items():
        if value is None or value in _USUAL.get(name, ()):
            continue
        if name in TAKEN[wire]:
            asked[name] = value
        elif name not in _OF_NO_EFFECT:
            raise _rejected(f"This provider can't honour the parameter {name!r}.", param=name)
    limit = body.get("max_completion_tokens")
    if limit is not None:
        asked["max_tokens"] = limit
    if not asked.get("tools"):
        asked.pop("tools", None)
        asked.pop("tool_choice", None)
    if asked.get("response_format") == {"type": "text"}:
        del asked["response_format"]
    _check_tools(asked)
    _check_choice(asked.get("tool_choice", "auto"))
    return asked | {"stream": job.stream}


class Answers:
    """Turns the pieces of one answer into chunks as OpenAI's API has them."""

    def __init__(self) -> None:
        self._begun = False
        self._places: dict[int, int] = {}  # a tool call's index as told: its index among the calls

    def piece(self, told: dict[str, Any]) -> bytes | None:
        """A piece of a stream; None if there is nothing in it."""
        choices = [choice for choice in told.get("choices") or () if self._says(choice)]
        if not choices and told.get("usage") is None:
            return None
        return _encoded(told, choices)

    def whole(self, told: dict[str, Any]) -> bytes:
        choices = told.get("choices") or []
        for choice in choices:
            _mend(choice["message"])
        return _encoded(told, choices)

    def _says(self, choice: dict[str, Any]) -> bool:
        """Mends *choice*, and tells whether anything is in it."""
        delta = choice.setdefault("delta", {})
        choice.setdefault("finish_reason", None)
        _mend(delta)
        for call in delta.get("tool_calls") or ():
            call["index"] = self._places.setdefault(call["index"], len(self._places))
        delta.pop("role", None)
        if self._begun and not any(delta.values()) and choice["finish_reason"] is None:
            return False
        if not self._begun:
            delta["role"] = "assistant"
            self._begun = True
        return True


def _mend(said: dict[str, Any]) -> None:
    """The reasoning as a text, under the name that clients read."""
    reasoning = said.pop("reasoning", None)
    if isinstance(reasoning, dict):
        reasoning = reasoning.get("content")
    if reasoning:
        said["reasoning_content"] = reasoning


def _encoded(told: dict[str, Any], choices: list[Any]) -> bytes:
    usage = {} if told.get("usage") is None else {"usage": told["usage"]}
    return msgspec.json.encode({"choices": choices, **usage})


def _message(message: Any) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    match role:
        case "system" | "developer":
            return {"role": "system", "content": _text(message.get("content"))}
        case "user":
            return {"role": "user", "content": message.get("content")}
        case "assistant":
            said = {**message, "content": _text(message.get("content"))}
            if not said.get("tool_calls"):
                said.pop("tool_calls", None)
            return said
        case "tool":
            return {**message, "content": _text(message.get("content"))}
        case _:
            raise _rejected(f"This provider has no messages of the role {role!r}.", param="messages")


def _text(content: Any) -> str:
    """A content that may be parts, as one text."""
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    return content if isinstance(content, str) else ""


def _part_text(part: Any) -> str:
    if isinstance(part, dict):
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            return text
    raise _rejected("This provider takes other content than text from users only.", param="messages")


def _check_tools(asked: dict[str, Any]) -> None:
    """What any-llm would stumble over or leave out. Raises: ProviderRejected."""
    for tool in asked.get("tools", ()):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise _rejected("This provider has tools of the type 'function' only.", param="tools")
    for message in asked["messages"]:
        for call in message.get("tool_calls", ()):
            try:
                arguments = msgspec.json.decode(call["function"]["arguments"] or "{}")
            except (*_NOT_JSON, KeyError, TypeError) as error:
                raise _rejected("A tool call's arguments are not JSON.", param="messages") from error
            if not isinstance(arguments, dict):
                raise _rejected("A tool call's arguments are not a JSON object.", param="messages")


def _check_choice(choice: Any) -> None:
    """Raises: ProviderRejected."""
    if choice in ("auto", "none", "required"):
        return
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _rejected("This provider can't honour this tool_choice.", param="tool_choice")


def _rejected(message: str, *, param: str | None = None) -> ProviderRejected:
    return ProviderRejected(message, status=400, type_="invalid_request_error", param=param)
