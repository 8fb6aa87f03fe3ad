"""What only vLLM can do: found out by asking for it, and then asked for with each job; pure but for `probe`.

Powers are never told by a name in the configuration: another server behind the same address simply doesn't have them.
Source: docs/adr/0050-vllm.md, docs/adr/0054-what-an-engine-says.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw, Struct

from schemas.errors import ProviderRejected
from workers.providers.openai import OpenAI

PROBE_TIMEOUT_S = 60.0  # the first answer of a fresh engine may compile something
PROBE_BYTES_MAX = 1024 * 1024
FLEX_PRIORITY = 1  # of a request that has time; the others have 0, and lower goes first
PRIORITY_MAX = 2**31 - 1

_FLEX = b'"flex"'
_TRUE = Raw(b"true")
ONWARD: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
_IDS: dict[str, Any] = {"return_token_ids": True}
_PRIORITY: dict[str, Any] = {"priority": FLEX_PRIORITY}


class _Choice(Struct):
    token_ids: tuple[int, ...] | None = None


class _Answer(Struct):
    choices: tuple[_Choice, ...]


class _Size(Struct):
    prompt_tokens: int = 0


class _Sized(Struct):
    usage: _Size


_sized = msgspec.json.Decoder(_Sized).decode
_answer = msgspec.json.Decoder(_Answer).decode
_members = msgspec.json.Decoder(dict[str, Raw]).decode
_number = msgspec.json.Decoder(int).decode
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Powers:
    """What the server turned out to be able to do."""

    token_ids: bool = False
    priority: bool = (
        False  # it knows the member; whether it obeys is up to its --scheduling-policy, which it doesn't tell
    )
    prefix: bool = False  # it goes on with a last message of the assistant's, and doesn't answer it


async def probe(server: OpenAI, model: str) -> Powers:
    """A real one-token request of *model* (the server's name for it) that asks for all of it, then for less.

    Raises: Fault if not even the plain request is answered.
    """
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for wanted in ({**_IDS, **_PRIORITY}, _IDS):
        try:
            answer = await _ask(server, {**asked, **wanted})
        except ProviderRejected:  # perhaps only for what it doesn't know
            continue
        knows = _has_ids(answer)  # else it ignores what it doesn't know, and priority would be among that
        prefix = await _goes_on(server, asked)
        return Powers(token_ids=knows, priority=knows and "priority" in wanted, prefix=prefix)
    await _ask(server, asked)
    return Powers(prefix=await _goes_on(server, asked))


async def _goes_on(server: OpenAI, asked: dict[str, Any]) -> bool:
    """Whether it goes on with an answer: the prompt is shorter then than one that opens another answer behind it.

    A server that ignores what it doesn't know counts the same prompt twice.
    """
    messages = [*asked["messages"], {"role": "assistant", "content": "Hi"}]
    sizes: list[int] = []
    for wanted in (ONWARD, {}):
        try:
            answer = await _ask(server, {**asked, "messages": messages, **wanted})
            sizes.append(_sized(answer).usage.prompt_tokens)
        except (ProviderRejected, msgspec.MsgspecError, UnicodeDecodeError):
            return False
    return 0 < sizes[0] < sizes[1]


async def _ask(server: OpenAI, body: dict[str, Any]) -> bytes:
    return await server.fetch(
        "POST", "/chat/completions", body=_encode(body), within_s=PROBE_TIMEOUT_S, max_bytes=PROBE_BYTES_MAX
    )


def _has_ids(answer: bytes) -> bool:
    try:
        return any(choice.token_ids for choice in _answer(answer).choices)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False


def empowered(body: bytes, powers: Powers) -> bytes:
    """*body*, a job's as it goes out, with what *powers* allow to ask for."""
    if not (powers.token_ids or powers.priority):
        return body
    members = _members(body)
    if powers.token_ids:
        members["return_token_ids"] = _TRUE
    if powers.priority:
        _settle_priority(members)
    return _encode(members)


def _settle_priority(members: dict[str, Raw]) -> None:
    """A client may let others go first, but never go before them. What isn't a number is the engine's to refuse."""
    least = FLEX_PRIORITY if bytes(members.get("service_tier", b"")) == _FLEX else 0
    own = members.get("priority")
    if own is None:
        wanted = 0
    else:
        try:
            wanted = _number(own)
        except msgspec.MsgspecError:
            return
    settled = min(max(wanted, least), PRIORITY_MAX)
    if own is not None or settled:
        members["priority"] = Raw(_encode(settled))
