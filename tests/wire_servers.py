"""Servers that speak Anthropic's and Google's own wires, as far as a chat needs them.

Outside witnesses: they share no code with the product.

Use one as

    async with AnthropicServer() as server:
        server.script(tokens=3)
        ... server.base_url ... server.seen[-1].body, server.answering, server.connections
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

NEVER = 10**9


@dataclass(frozen=True, kw_only=True)
class Script:
    """How requests are answered. Places count the tokens of the answer."""

    tokens: int = 3  # numbered words
    thinking: str | None = None  # said first
    call: dict[str, Any] | None = None  # {"name": …, "input": {…}}: a tool call after the text
    cached: int = 0  # tokens of the prompt
    ends: str | None = None  # another reason to stop, in the wire's own words
    pace_s: float = 0.0
    status: int = 200
    body: Any = None  # instead of an answer
    headers: dict[str, str] = field(default_factory=dict)
    stall_at: int = NEVER
    cut_at: int = NEVER  # resets the connection
    end_at: int = NEVER  # ends the body properly
    error_at: int = NEVER  # says `error` in the stream
    error: Any = None


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: Any
    finished: bool = False
    gone: bool = False


class WireServer(ABC):
    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._script = Script()
        self._runner: web.AppRunner | None = None
        self.base_url = ""

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.base_url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def script(self, **changes: Any) -> None:
        self._script = Script(**changes)

    @property
    def answering(self) -> int:
        return sum(1 for seen in self.seen if not (seen.finished or seen.gone))

    @property
    def connections(self) -> int:
        assert self._runner is not None
        assert self._runner.server is not None
        return len(self._runner.server.connections)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        seen = Seen(
            request.path, {k.lower(): v for k, v in request.headers.items()}, json.loads(text) if text else None
        )
        self.seen.append(seen)
        try:
            answer = await self._answer(request, seen)
        except asyncio.CancelledError:
            seen.gone = True
            raise
        seen.finished = True
        return answer

    async def _answer(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        script = self._script
        if script.body is not None or script.status != 200:
            return web.json_response(script.body or {}, status=script.status, headers=script.headers)
        if request.method == "GET":
            return web.json_response(self.models())
        if not self.streams(request, seen.body):
            for place in range(script.tokens):
                await self._before(place, script, request)
            return web.json_response(self.whole(script), headers=script.headers)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **script.headers})
        await response.prepare(request)
        async for event in self._events(script, request):
            await response.write(event)
        return response

    async def _events(self, script: Script, request: web.Request) -> AsyncIterator[bytes]:
        yield self.opening(script)
        for place in range(script.tokens):
            await self._before(place, script, request)
            if place >= script.end_at:
                return
            if place >= script.error_at:
                yield self.failure(script.error)
                return
            yield self.token(place, script)
        yield self.ending(script)

    async def _before(self, place: int, script: Script, request: web.Request) -> None:
        if script.pace_s:
            await asyncio.sleep(script.pace_s)
        if place >= script.stall_at:
            await asyncio.Event().wait()
        if place >= script.cut_at and request.transport is not None:
            request.transport.abort()
            await asyncio.Event().wait()

    @abstractmethod
    def streams(self, request: web.Request, body: Any) -> bool: ...
    @abstractmethod
    def models(self) -> Any: ...
    @abstractmethod
    def whole(self, script: Script) -> Any: ...
    @abstractmethod
    def opening(self, script: Script) -> bytes: ...
    @abstractmethod
    def token(self, place: int, script: Script) -> bytes: ...
    @abstractmethod
    def ending(self, script: Script) -> bytes: ...
    @abstractmethod
    def failure(self, error: Any) -> bytes: ...


def word(place: int) -> str:
    return f"w{place}" if place == 0 else f" w{place}"


class AnthropicServer(WireServer):
    """Source: https://platform.claude.com/docs/en/build-with-claude/streaming"""

    def streams(self, request: web.Request, body: Any) -> bool:
        assert request.path == "/v1/messages", request.path
        return bool(body.get("stream"))

    def models(self) -> Any:
        one = {"type": "model", "id": "claude-x", "display_name": "X", "created_at": "2026-01-01T00:00:00Z"}
        return {"data": [one], "has_more": False, "first_id": "claude-x", "last_id": "claude-x"}

    def whole(self, script: Script) -> Any:
        content: list[Any] = []
        if script.thinking is not None:
            content.append({"type": "thinking", "thinking": script.thinking, "signature": "c2ln"})
        content.append({"type": "text", "text": "".join(word(place) for place in range(script.tokens))})
        if script.call is not None:
            content.append({"type": "tool_use", "id": "toolu_1", **script.call})
        return {
            **self._head(),
            "content": content,
            "stop_reason": self._reason(script),
            "usage": {**self._prompt(script), "output_tokens": script.tokens},
        }

    def opening(self, script: Script) -> bytes:
        message = {**self._head(), "content": [], "stop_reason": None}
        told = _event("message_start", message={**message, "usage": {**self._prompt(script), "output_tokens": 1}})
        if script.thinking is not None:
            told += _event(
                "content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""}
            )
            told += _event(
                "content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": script.thinking}
            )
            told += _event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "c2ln"})
            told += _event("content_block_stop", index=0)
        block = {"type": "text", "text": ""}
        return told + _event("content_block_start", index=self._text_index(script), content_block=block)

    def token(self, place: int, script: Script) -> bytes:
        delta = {"type": "text_delta", "text": word(place)}
        return _event("content_block_delta", index=self._text_index(script), delta=delta)

    def ending(self, script: Script) -> bytes:
        told = _event("content_block_stop", index=self._text_index(script))
        if script.call is not None:
            name, arguments = script.call["name"], json.dumps(script.call["input"])
            block = {"type": "tool_use", "id": "toolu_1", "name": name, "input": {}}
            index = self._text_index(script) + 1
            told += _event("content_block_start", index=index, content_block=block)
            for piece in (arguments[:5], arguments[5:]):
                delta = {"type": "input_json_delta", "partial_json": piece}
                told += _event("content_block_delta", index=index, delta=delta)
            told += _event("content_block_stop", index=index)
        delta = {"stop_reason": self._reason(script), "stop_sequence": None}
        told += _event("message_delta", delta=delta, usage={"output_tokens": script.tokens})
        return told + _event("message_stop")

    def failure(self, error: Any) -> bytes:
        return _event("error", error=error)

    def _text_index(self, script: Script) -> int:
        return 0 if script.thinking is None else 1

    def _head(self) -> dict[str, Any]:
        return {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "stop_sequence": None}

    def _prompt(self, script: Script) -> dict[str, Any]:
        """The cached tokens are told apart from the others."""
        return {"input_tokens": 10, "cache_read_input_tokens": script.cached, "cache_creation_input_tokens": 0}

    def _reason(self, script: Script) -> str:
        return script.ends or ("tool_use" if script.call else "end_turn")


class GeminiServer(WireServer):
    """Source: https://ai.google.dev/api/generate-content"""

    def streams(self, request: web.Request, body: Any) -> bool:  # noqa: ARG002
        assert request.path.startswith("/v1beta/models/theirs:"), request.path
        return request.path.endswith(":streamGenerateContent")

    def models(self) -> Any:
        return {"models": [{"name": "models/gemini-x"}]}

    def whole(self, script: Script) -> Any:
        text = "".join(word(place) for place in range(script.tokens))
        return self._said([*self._thought(script), {"text": text}, *self._call(script)], script)

    def opening(self, script: Script) -> bytes:
        return b"".join(_data(self._said([part])) for part in self._thought(script))

    def token(self, place: int, script: Script) -> bytes:  # noqa: ARG002
        return _data(self._said([{"text": word(place)}]))

    def ending(self, script: Script) -> bytes:
        return _data(self._said(self._call(script), script))

    def failure(self, error: Any) -> bytes:
        return _data({"error": error})

    def _said(self, parts: list[Any], last: Script | None = None) -> Any:
        candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
        told: dict[str, Any] = {"candidates": [candidate], "modelVersion": "gemini-x", "responseId": "r1"}
        if last is not None:
            candidate["finishReason"] = last.ends or "STOP"
            thoughts = len((last.thinking or "").split())
            prompt = 10 + last.cached  # the cached ones are part of it
            told["usageMetadata"] = {
                "promptTokenCount": prompt,
                "cachedContentTokenCount": last.cached,
                "candidatesTokenCount": last.tokens,
                "thoughtsTokenCount": thoughts,
                "totalTokenCount": prompt + last.tokens + thoughts,
            }
        return told

    def _thought(self, script: Script) -> list[Any]:
        return [] if script.thinking is None else [{"text": script.thinking, "thought": True}]

    def _call(self, script: Script) -> list[Any]:
        if script.call is None:
            return []
        return [{"functionCall": {"name": script.call["name"], "args": script.call["input"]}}]


def _event(name: str, **members: Any) -> bytes:
    return f"event: {name}\n".encode() + _data({"type": name, **members})


def _data(told: Any) -> bytes:
    return b"data: " + json.dumps(told).encode() + b"\r\n\r\n"
