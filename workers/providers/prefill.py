"""Going on behind an answer's text: its last message is the assistant's, and the provider is told not to answer it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw, Struct

from schemas.errors import NotContinued
from schemas.jobs import Continuation, Job

# How a last message of the assistant's is marked as one to be gone on with: by the table's `prefill`. Mistral and DeepSeek
# ("prefix") are left out: whether the one tells the prefix again isn't known, and the other takes it at another address.
MARKS: Mapping[str, Mapping[str, bool]] = {"as-it-is": {}, "partial": {"partial": True}}

_members = msgspec.json.Decoder(dict[str, Raw]).decode
_messages = msgspec.json.Decoder(list[Raw]).decode
_encode = msgspec.json.encode


class _Part(Struct):
    type: str = ""


class _Message(Struct):
    content: str | list[_Part] | None = None

    @property
    def is_text(self) -> bool:
        return not isinstance(self.content, list) or all(part.type == "text" for part in self.content)


class Request(Struct):
    """What of a request for a chat has to be known to go on with its answer."""

    messages: list[_Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Any = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def is_text(self) -> bool:
        """Whether its prompt is nothing but text."""
        return all(message.is_text for message in self.messages)


_request = msgspec.json.Decoder(Request).decode


def read_request(job: Job) -> Request:
    """Raises: NotContinued."""
    try:
        return _request(job.body)
    except msgspec.MsgspecError as error:
        raise NotContinued from error


def prefilled(
    job: Job, before: Continuation, *, mark: Mapping[str, bool] | None = None, members: Mapping[str, bool] | None = None
) -> Job:
    """*job* as one that goes on behind ``before.text``: *mark* is for that message, *members* for the request.

    Raises: NotContinued if there is no token left to be said, or a stop sequence may have begun.
    """
    request = read_request(job)
    if before.reasoning or _may_have_begun(request.stops, before.text):
        raise NotContinued
    body = _members(job.body)
    said = {"role": "assistant", "content": before.text, **(mark or {})}
    body["messages"] = Raw(_encode([*_messages(body["messages"]), said]))
    body |= {name: Raw(_encode(value)) for name, value in (members or {}).items()}
    return msgspec.structs.replace(job, body=Raw(_encode(_shrunk(body, before, request))))


def _may_have_begun(stops: list[str], text: str) -> bool:
    """Whether *text* ends in the beginning of a stop sequence: nobody would find that behind the seam."""
    return any(text.endswith(stop[:size]) for stop in stops for size in range(1, len(stop)))


def _shrunk(members: dict[str, Raw], before: Continuation, request: Request) -> dict[str, Raw]:
    for name in ("max_tokens", "max_completion_tokens"):
        limit = getattr(request, name)
        if limit is not None:
            if limit <= before.tokens:
                raise NotContinued
            members[name] = Raw(_encode(limit - before.tokens))
    if request.min_tokens:
        members["min_tokens"] = Raw(_encode(max(0, request.min_tokens - before.tokens)))
    return members
