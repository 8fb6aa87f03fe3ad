"""What the tests ask, and what has to be equal in two answers to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.vllm.engine import MODEL
from tests.vllm.tiny_model import Conversation

JSON_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "celsius": {"type": "integer"}},
    "required": ["city", "celsius"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": JSON_SCHEMA}}
LONG = 8000  # tokens: seconds of the engine's time
WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def ask(conversation: Conversation, **changes: Any) -> dict[str, Any]:
    """Arguments of `create` for *conversation*, decoded greedily."""
    asked: dict[str, Any] = {"model": MODEL, "messages": conversation.messages, "temperature": 0}
    if conversation.tools:
        asked["tools"] = list(conversation.tools)
    return {**asked, **changes}


def endless(conversation: Conversation, *, tokens: int, **changes: Any) -> dict[str, Any]:
    """Exactly *tokens* tokens: the engine goes on past the end of the answer."""
    return ask(conversation, max_tokens=tokens, extra_body={"ignore_eos": True}, **changes)


def answer(completion: ChatCompletion) -> list[dict[str, Any]]:
    """All that *completion* says: its choices without what is new in every answer, and reasoning under one name."""
    return [comparable(choice.to_dict()) for choice in completion.choices]


def comparable(choice: Any) -> dict[str, Any]:
    message = choice["message"]
    for call in message.get("tool_calls") or ():
        assert call.pop("id")
    # Penstock tells reasoning under the name that most clients read too, beside the engine's own.
    assert message.pop("reasoning_content", message["reasoning"]) == message["reasoning"]
    assert not choice.pop("token_ids", None)  # the engine says null for them, and Penstock nothing
    return {**choice}


def usage(completion: ChatCompletion | ChatCompletionChunk) -> tuple[int, int, int]:
    """Tokens of the prompt, of the answer, and of both."""
    assert completion.usage is not None
    return completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens


def joined(chunks: Iterable[ChatCompletionChunk]) -> dict[int, dict[str, Any]]:
    """The choices that *chunks* add up to, by index: content, reasoning, tool calls by index, finish_reason."""
    choices: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"content": "", "reasoning": "", "calls": defaultdict(list), "finish_reason": None}
    )
    for part in (choice for chunk in chunks for choice in chunk.choices):
        choice = choices[part.index]
        choice["content"] += part.delta.content or ""
        choice["reasoning"] += (part.delta.model_extra or {}).get("reasoning") or ""
        for call in part.delta.tool_calls or ():
            assert call.function is not None
            choice["calls"][call.index] += [call.function.name or "", call.function.arguments or ""]
        if part.finish_reason is not None:
            assert choice["finish_reason"] is None, "a choice ends once"
            choice["finish_reason"] = part.finish_reason
    for choice in choices.values():
        # The engine leaves this mark in when the token after it comes in the same chunk, which is a matter of timing.
        choice["reasoning"] = choice["reasoning"].removeprefix("<think>")
    return {
        index: {**choice, "calls": {i: "".join(parts) for i, parts in choice["calls"].items()}}
        for index, choice in choices.items()
    }


def check_form(chunks: list[ChatCompletionChunk], *, with_usage: bool) -> None:
    """What holds for every stream of the API: one identity, one role, usage null until a last chunk without choices."""
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    if with_usage:
        *chunks, last = chunks
        assert last.choices == []
        assert last.usage is not None
        assert all("usage" in chunk.model_fields_set for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
