"""The habits of servers that are almost compatible, and what they are turned into; pure, and the one place for it.

An answer that shows none of these is passed on as it came:

============================================  ============================================  ==============================
what a server does                            who (and where it is told)                    what the client gets
============================================  ============================================  ==============================
reasoning as ``reasoning``                    Ollama (its openai/openai.go), vLLM, and      also ``reasoning_content``,
                                              LM Studio for some models (its API changelog  which most clients read
                                              at 0.3.23)
reasoning as ``thinking``                     Ollama's own API, and what imitates it        the same
``finish_reason: ""`` until the end           older Ollama (ollama#4357)                    null; "stop" in a whole answer
``finish_reason: "stop"`` after tool calls    older Ollama (ollama#7963), LM Studio before  "tool_calls"
                                              0.3.15 (its API changelog)
tool calls without ``index`` in a stream      older Ollama (ollama#7881)                    counted
several calls under one ``index``             bridges to Ollama (litellm#37792)             counted
tool calls without ``id`` or ``type``         the same (litellm#24095)                      an id made here; "function"
``arguments`` as an object                    llama.cpp (llama.cpp#20198), TGI (tgi#2136)   the same as JSON text
``max_completion_tokens`` goes unheard        Ollama (ollama#7125)                          said as ``max_tokens`` too
============================================  ============================================  ==============================

Other habits are none to the readers: a missing ``[DONE]``, missing usage, whole tool calls in one chunk, errors inside a 200
(openai_chunks.py); errors in an SSE field of their own (sse.py); streams under another content type (openai.py).

"stop" after tool calls is what OpenAI itself says where the client forced a call; there it stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from uuid import uuid4

import msgspec
from msgspec import Raw, Struct

NULL = Raw(b"null")
TOOL_CALLS_MAX = 1024  # of one choice are kept in mind; further ones are passed on as they come

_STOP, _TOOL_CALLS, _FUNCTION = Raw(b'"stop"'), Raw(b'"tool_calls"'), Raw(b'"function"')
_NO_ARGUMENTS = Raw(b'"{}"')
_NOTHING = (NULL, Raw(b'""'))
_UNTOLD = -1

_Members = dict[str, Raw]
_objects = msgspec.json.Decoder(list[_Members]).decode
_members = msgspec.json.Decoder(_Members).decode
_encode = msgspec.json.encode


class Said(Protocol):
    """A delta or a message, as far as it is looked into. What isn't there is `NULL` itself."""

    reasoning_content: Raw
    reasoning: Raw
    thinking: Raw
    tool_calls: Raw


class _Call(Struct):
    """A tool call that has begun: the index that its server gave it, if any; the one it has here; its id."""

    stated: int
    index: int
    id: Raw


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


class Habits:
    """What one answer has shown so far. *request* is the body that is answered; calls without an id get one of *new_id*."""

    def __init__(self, request: bytes | Raw = b"{}", *, new_id: Callable[[], str] = new_call_id) -> None:
        self.request = request
        self._new_id = new_id
        self._calls: dict[int, list[_Call]] = {}  # by choice

    def show(self, said: Said | None, finish_reason: str | None) -> bool:
        """Whether a choice must be looked at more closely. It is asked for each chunk, and nearly always the answer is no."""
        if finish_reason == "" or (finish_reason == "stop" and self._calls):
            return True
        return said is not None and (
            said.tool_calls is not NULL
            or said.thinking is not NULL
            or (said.reasoning is not NULL and said.reasoning_content is NULL)
        )

    def mended(self, choices: bytes | Raw, *, streamed: bool) -> bytes | Raw:
        """The same choices without the habits, byte for byte the same where they have none.

        Raises: msgspec.DecodeError if they aren't a list of objects.
        """
        mended, member = _objects(choices), "delta" if streamed else "message"
        changed = False
        for choice in mended:
            index = max(0, _number(choice.get("index")))
            if (said_raw := choice.get(member, NULL)) != NULL:
                said = _members(said_raw)
                if _reasoning_told_twice(said) | self._calls_mended(said, index, streamed=streamed):
                    choice[member] = Raw(_encode(said))
                    changed = True
            if (reason := self._reason(choice, index, streamed=streamed)) is not None:
                choice["finish_reason"] = reason
                changed = True
        return Raw(_encode(mended)) if changed else choices

    def _reason(self, choice: _Members, index: int, *, streamed: bool) -> Raw | None:
        """What the finish reason should be instead; None if it is well."""
        reason = choice.get("finish_reason", NULL)
        if reason == _NOTHING[1]:
            return NULL if streamed else _STOP
        return _TOOL_CALLS if reason == _STOP and self._calls.get(index) and not forces_call(self.request) else None

    def _calls_mended(self, said: _Members, choice: int, *, streamed: bool) -> bool:
        if (raw := said.get("tool_calls", NULL)) == NULL:
            return False
        try:
            calls = _objects(raw)
            changed = [self._call_mended(call, choice, streamed=streamed) for call in calls]
        except msgspec.DecodeError:  # a shape of its own: the client's to make sense of
            return False
        if any(changed):
            said["tool_calls"] = Raw(_encode(calls))
        return any(changed)

    def _call_mended(self, call: _Members, choice: int, *, streamed: bool) -> bool:
        function = None if call.get("function", NULL) == NULL else _members(call["function"])
        begun = self._calls.setdefault(choice, [])
        known = self._gone_on_with(call, function, begun) if streamed else None
        changed = False
        if known is None:
            known, changed = self._begin(call, function, begun)
        if streamed and _number(call.get("index")) != known.index:
            call["index"] = Raw(_encode(known.index))
            changed = True
        return (function is not None and _arguments_as_text(call, function, streamed=streamed)) or changed

    def _gone_on_with(self, call: _Members, function: _Members | None, begun: list[_Call]) -> _Call | None:
        """The call that this piece of a stream belongs to; None if it begins another one."""
        stated, stated_id = _number(call.get("index")), call.get("id", NULL)
        begins = stated_id not in _NOTHING or (function is not None and function.get("name", NULL) not in _NOTHING)
        if stated == _UNTOLD:
            return None if begins or not begun else begun[-1]
        known = next((each for each in reversed(begun) if each.stated == stated), None)
        if known is not None and begins and stated_id not in (*_NOTHING, known.id):
            return None
        return known

    def _begin(self, call: _Members, function: _Members | None, begun: list[_Call]) -> tuple[_Call, bool]:
        stated, taken = _number(call.get("index")), {each.index for each in begun}
        index = stated if stated != _UNTOLD and stated not in taken else max(taken, default=-1) + 1
        changed = False
        if call.get("id", NULL) in _NOTHING:
            call["id"] = Raw(_encode(self._new_id()))
            changed = True
        if call.get("type", NULL) in _NOTHING and function is not None:
            call["type"] = _FUNCTION
            changed = True
        id_ = Raw(bytes(call["id"]))  # a copy: a view would keep the chunk alive
        known = _Call(stated=stated, index=index, id=id_)
        if len(begun) < TOOL_CALLS_MAX:
            begun.append(known)
        return known, changed


def say_max_tokens(body: _Members) -> None:
    """For a server that doesn't know ``max_completion_tokens``: the limit under its older name too, in place."""
    limit = body.get("max_completion_tokens", NULL)
    if limit != NULL and body.get("max_tokens", NULL) == NULL:
        body["max_tokens"] = limit


def forces_call(request: bytes | Raw) -> bool:
    """Whether the request's ``tool_choice`` leaves the model no choice."""
    return bytes(_members(request).get("tool_choice", NULL)) not in (b"null", b'"auto"', b'"none"')


def _reasoning_told_twice(said: _Members) -> bool:
    """Tells the reasoning under the name that most clients read, beside the server's own."""
    if said.get("reasoning_content", NULL) != NULL:
        return False
    for name in ("reasoning", "thinking"):
        reasoning = said.get(name, NULL)
        if reasoning not in _NOTHING and bytes(reasoning).startswith(b'"'):
            said["reasoning_content"] = reasoning
            return True
    return False


def _arguments_as_text(call: _Members, function: _Members, *, streamed: bool) -> bool:
    arguments = bytes(function.get("arguments", NULL))
    if arguments.startswith((b"{", b"[")):
        function["arguments"] = Raw(_encode(arguments.decode()))
    elif arguments == b"null" and not streamed:
        function["arguments"] = _NO_ARGUMENTS
    else:
        return False
    call["function"] = Raw(_encode(function))
    return True


def _number(raw: Raw | None) -> int:
    digits = b"" if raw is None else bytes(raw)
    return int(digits) if digits.isdigit() and len(digits) < 10 else _UNTOLD
