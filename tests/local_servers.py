"""Ollama, LM Studio, llama.cpp and vLLM as they look from outside, with their recorded habits; and others on their ports.

Each speaks HTTP over TCP and shares no code with the product. Use one in a test as

    async with Ollama() as server:
        server.pull("qwen3:0.6b")
        ... server.address, server.seen, server.loads

or as a program, whose first line is its address: ``python tests/local_servers.py ollama --port 0 --model qwen3:0.6b``; a
program is told things by ``POST /fake/pull {"name": …}`` and ``POST /fake/remove {"name": …}``.

What they do is recorded in: ollama/ollama openai/openai.go, middleware/openai.go and its issues 4357, 7125, 7881, 7963, 14964;
lmstudio-ai/docs 0_app/0_root/api-changelog.md, 4_api/2_rest/v0.md and lmstudio-bug-tracker issue 618; ggml-org/llama.cpp
tools/server/README.md and issues 14566, 20198.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

WORDS = ("one", "two", "three", "four", "five")
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}


@dataclass
class Reply:
    body: Any = None  # as JSON; bytes as they are
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    events: list[bytes] | None = None  # a stream instead
    pace_s: float = 0.0


@dataclass
class Asked:
    method: str
    path: str
    body: Any


class Server:
    """What they have in common: one request after the other on each connection."""

    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.seen: list[Asked] = []
        self.unexpected: list[str] = []  # questions that it doesn't know
        self.silent = asyncio.Event()  # set: it takes requests and says nothing
        self.pace_s = 0.0  # between the pieces of an answer
        self.streaming = self.streaming_most = 0
        self._live: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, limit=2**22)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Its connections break, and new ones are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._live):
            writer.transport.abort()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def asked(self, path: str) -> list[Asked]:
        return [each for each in self.seen if each.path == path]

    @property
    def generated(self) -> list[str]:
        """The models that were asked for an answer."""
        return [each.body["model"] for each in self.asked("/v1/chat/completions")]

    def answer(self, asked: Asked) -> Reply | None:
        """None: it doesn't know the question."""
        raise NotImplementedError

    def not_known(self, asked: Asked) -> Reply:
        return Reply({"error": f"no {asked.path}"}, 404)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._live.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ", 2)
                fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                raw = await reader.readexactly(int(fields.get("content-length", "0")))
                asked = Asked(method, path, json.loads(raw) if raw else None)
                if path.startswith("/fake/"):
                    getattr(self, path.removeprefix("/fake/"))(**asked.body)
                    reply: Reply = Reply({})
                else:
                    self.seen.append(asked)
                    if self.silent.is_set():
                        await asyncio.Event().wait()
                    found = self.answer(asked)
                    if found is None:
                        self.unexpected.append(f"{method} {path}")
                    reply = found or self.not_known(asked)
                await self._send(writer, reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._live.discard(writer)
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> None:
        streamed = reply.events is not None
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {
            "Content-Type": "text/event-stream" if streamed else "application/json; charset=utf-8",
            **({"Transfer-Encoding": "chunked"} if streamed else {"Content-Length": str(len(body))}),
            **self.headers,
            **reply.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {reply.status} Whatever\r\n{head}\r\n".encode("latin-1"))
        if reply.events is None:
            writer.write(body)
        else:
            await self._stream(writer, reply.events)
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, events: list[bytes]) -> None:
        self.streaming += 1
        self.streaming_most = max(self.streaming, self.streaming_most)
        try:
            for event in events:
                if self.pace_s:
                    await asyncio.sleep(self.pace_s)
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        finally:
            self.streaming -= 1


class Chat(Server):
    """A server that answers chats: with `WORDS`, as many as it is allowed; with a tool call where tools are given."""

    done = True  # says [DONE]
    tells_usage = True
    reasoning_name = "reasoning_content"
    fingerprint: str | None = None

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.broken: dict[str, Reply] = {}  # models that can't, and what is said then

    def chat(self, body: dict[str, Any]) -> Reply:
        if (broken := self.broken.get(body["model"])) is not None:
            return broken
        if not body.get("stream"):
            return Reply(self._whole(body))
        return Reply(
            events=[b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in self._chunks(body)] + self._end()
        )

    def limit(self, body: dict[str, Any]) -> int:
        return int(body.get("max_tokens") or len(WORDS))

    def call(self, *, streamed: bool) -> dict[str, Any]:
        """The call, in one piece; in a stream with its index."""
        return {**TOOL_CALL, "index": 0} if streamed else dict(TOOL_CALL)

    def call_finish(self) -> str:
        return "tool_calls"

    def _said(self, body: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """The pieces of an answer, and how it ends."""
        if body.get("tools"):
            return [{"content": "", "tool_calls": [self.call(streamed=bool(body.get("stream")))]}], self.call_finish()
        words = WORDS[: self.limit(body)]
        pieces: list[dict[str, Any]] = [{"content": f"{word} "} for word in words]
        if "think" in json.dumps(body["messages"]):
            pieces.insert(0, {"content": "", self.reasoning_name: "hm"})
        return pieces, "length" if len(words) < len(WORDS) else "stop"

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        pieces, finish = self._said(body)
        message: dict[str, Any] = {"role": "assistant"}
        for piece in pieces:
            for name, value in piece.items():
                message[name] = message.get(name, "") + value if isinstance(value, str) else value
        choices = [{"index": 0, "message": message, "finish_reason": finish}]
        return {**self._head(body, "chat.completion"), "choices": choices, "usage": self._usage(pieces)}

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        pieces, finish = self._said(body)
        head = self._head(body, "chat.completion.chunk")
        for piece in pieces:
            delta = {"role": "assistant", **piece}
            yield {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": self.unfinished()}]}
        yield {**head, "choices": [{"index": 0, "delta": self.last_delta(), "finish_reason": finish}]}
        if self.tells_usage and (body.get("stream_options") or {}).get("include_usage"):
            yield {**head, "choices": [], "usage": self._usage(pieces)}

    def unfinished(self) -> str | None:
        return None

    def last_delta(self) -> dict[str, Any]:
        return {}

    def _end(self) -> list[bytes]:
        return [b"data: [DONE]\n\n"] if self.done else []

    def _usage(self, pieces: list[dict[str, Any]]) -> dict[str, int]:
        return {"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 7 + len(pieces)}

    def _head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        head = {"id": "chatcmpl-42", "object": kind, "created": 1_763_000_000, "model": body["model"]}
        return head if self.fingerprint is None else {**head, "system_fingerprint": self.fingerprint}


class Ollama(Chat):
    """*old*: capabilities are only shown when asked for one by one, and calls have no index and end with "stop"."""

    reasoning_name = "reasoning"
    fingerprint = "fp_ollama"

    def __init__(self, port: int = 0, *, old: bool = False) -> None:
        super().__init__(port)
        self.old = old
        self.models: dict[str, dict[str, Any]] = {}
        self.loaded: list[str] = []
        self.loads: list[str] = []  # models that a request loaded, in order

    def pull(
        self, name: str, *, size: int = 10**9, capabilities: tuple[str, ...] = ("completion",), **more: Any
    ) -> None:
        digest = f"sha256:{len(self.models):064x}"
        self.models[name] = {"size": size, "digest": digest, "capabilities": list(capabilities), **more}

    def remove(self, name: str) -> None:
        del self.models[name]

    def answer(self, asked: Asked) -> Reply | None:  # noqa: PLR0911 - a table
        match asked.method, asked.path:
            case "GET", "/api/version":
                return Reply({"version": "0.12.6"})
            case "GET", "/api/tags":
                return Reply({"models": [self._tag(name) for name in self.models]})
            case "POST", "/api/show":
                return Reply({"capabilities": self.models[asked.body["model"]]["capabilities"], "details": {}})
            case "GET", "/api/ps":
                return Reply({"models": [self._tag(name) for name in self.loaded]})
            case "GET", "/v1/models":
                data = [{"id": n, "object": "model", "created": 1, "owned_by": "library"} for n in self.models]
                return Reply({"object": "list", "data": data or None})  # Go's nil slice
            case "POST", "/v1/chat/completions":
                return self._chat(asked.body)
        return None

    def not_known(self, _: Asked) -> Reply:
        return Reply(b"404 page not found", 404, {"Content-Type": "text/plain"})

    def limit(self, body: dict[str, Any]) -> int:
        return int(body.get("max_tokens") or len(WORDS))  # and never max_completion_tokens

    def call(self, *, streamed: bool) -> dict[str, Any]:
        return dict(TOOL_CALL) if self.old else super().call(streamed=streamed)

    def call_finish(self) -> str:
        return "stop" if self.old else "tool_calls"

    def unfinished(self) -> str | None:
        return "" if self.old else None

    def last_delta(self) -> dict[str, Any]:
        return {"role": "assistant", "content": ""}

    def _chat(self, body: dict[str, Any]) -> Reply:
        name = body["model"]
        if name not in self.models:
            return Reply({"error": {"message": f"model '{name}' not found", "type": "not_found_error"}}, 404)
        if name not in self.loaded:
            self.loads.append(name)
            self.loaded.append(name)
        return self.chat(body)

    def _tag(self, name: str) -> dict[str, Any]:
        model = {"name": name, "model": name, "details": {"family": "llama"}, **self.models[name]}
        if self.old:
            del model["capabilities"]
        return model


class LmStudio(Chat):
    """*jit*: it loads what is asked for, and lists all that it has. It says 200 to what it doesn't know."""

    headers = MappingProxyType({"X-Powered-By": "Express"})
    reasoning_name = "reasoning"
    tells_usage = False  # before 0.3.18, in a stream

    def __init__(self, port: int = 0, *, jit: bool = True) -> None:
        super().__init__(port)
        self.jit = jit
        self.models: dict[str, dict[str, Any]] = {}

    def pull(self, name: str, *, type_: str = "llm", loaded: bool = False) -> None:
        self.models[name] = {"type": type_, "state": "loaded" if loaded else "not-loaded"}

    def remove(self, name: str) -> None:
        del self.models[name]

    def answer(self, asked: Asked) -> Reply | None:
        match asked.method, asked.path:
            case "GET", "/v1/models":
                names = [name for name, model in self.models.items() if self.jit or model["state"] == "loaded"]
                data = [{"id": name, "object": "model", "owned_by": "organization_owner"} for name in names]
                return Reply({"object": "list", "data": data})
            case "GET", "/api/v0/models":
                entries = [{"id": name, "object": "model", **model} for name, model in self.models.items()]
                return Reply({"object": "list", "data": entries})
            case "POST", "/v1/chat/completions":
                self.models[asked.body["model"]]["state"] = "loaded"
                return self.chat(asked.body)
        return None

    def not_known(self, asked: Asked) -> Reply:
        return Reply({"error": f"Unexpected endpoint or method. ({asked.method} {asked.path})"})

    def call_finish(self) -> str:
        return "stop"  # before 0.3.15


class LlamaCpp(Chat):
    """One model, named by its path. No [DONE], as older builds; arguments of calls as objects, as some builds."""

    headers = MappingProxyType({"Server": "llama.cpp"})
    done = False

    def __init__(self, port: int = 0, *, model: str = "/home/ann/models/Qwen3-0.6B-Q8_0.gguf", slots: int = 3) -> None:
        super().__init__(port)
        self.model = model
        self.slots = slots
        self.loading = False
        self.key: str | None = None

    def answer(self, asked: Asked) -> Reply | None:  # noqa: PLR0911 - a table
        if self.loading:
            return Reply({"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, 503)
        match asked.method, asked.path:
            case "GET", "/health":
                return Reply({"status": "ok"})
            case "GET", "/v1/models":
                entry = {"id": self.model, "object": "model", "owned_by": "llamacpp", "meta": {"size": 639_000_000}}
                return Reply({"object": "list", "data": [entry]})
            case "GET", "/props" if self.key is None:
                return Reply({"total_slots": self.slots, "build_info": "b6700-abcdef", "model_path": self.model})
            case "POST", "/v1/chat/completions" if self.key is None:
                return self.chat(asked.body)
            case _, ("/props" | "/v1/chat/completions"):
                error = {"code": 401, "message": "Invalid API Key", "type": "authentication_error"}
                return Reply({"error": error}, 401)
        return None

    def call(self, *, streamed: bool) -> dict[str, Any]:
        function = {"name": "weather", "arguments": {"city": "Oslo"}}
        return {**super().call(streamed=streamed), "function": function}


ENGINE_DIED = {"error": {"message": "EngineCore encountered an issue.", "code": 500}}
VLLM_METRICS = b"""\
vllm:num_requests_running{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.125
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="4096"} 1.0
"""


class Vllm(Chat):
    headers = MappingProxyType({"Server": "uvicorn"})

    def __init__(self, port: int = 0, *, model: str = "Qwen/Qwen3-0.6B") -> None:
        super().__init__(port)
        self.model = model
        self.dead = False  # its engine process is, and its front end not yet

    def answer(self, asked: Asked) -> Reply | None:
        said: Reply | None = None
        match asked.method, asked.path.partition("?")[0]:
            case "GET", "/version":
                said = Reply({"version": "0.33.0"})
            case "GET", "/v1/models":
                entry = {"id": self.model, "object": "model", "owned_by": "vllm", "max_model_len": 40960}
                said = Reply({"object": "list", "data": [entry]})
            case "GET", "/health":
                said = Reply(b"", 503 if self.dead else 200)
            case "GET", "/metrics" | "/metrics/":
                said = Reply(VLLM_METRICS, 200, {"Content-Type": "text/plain"})
            case "POST", "/detokenize":
                said = Reply({"prompt": "".join(f"{WORDS[at]} " for at in asked.body["tokens"])})
            case "POST", "/v1/chat/completions":
                said = Reply(ENGINE_DIED, 500) if self.dead else self.chat(asked.body)
        return said

    def not_known(self, _: Asked) -> Reply:
        return Reply({"detail": "Not Found"}, 404)

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        whole = super()._whole(body)
        if body.get("return_token_ids"):
            whole["choices"][0]["token_ids"] = list(range(whole["usage"]["completion_tokens"]))
        if body.get("add_generation_prompt") is False:
            whole["usage"]["prompt_tokens"] -= 2  # the opening of another answer
        return whole

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for at, chunk in enumerate(super()._chunks(body)):
            for choice in chunk["choices"] if body.get("return_token_ids") else ():
                choice["token_ids"] = [at] if choice["delta"].get("content") else []
            yield chunk


class Website(Server):
    """Somebody's web application on one of the ports."""

    def answer(self, asked: Asked) -> Reply | None:
        return Reply(b"<html>Welcome</html>", 200, {"Content-Type": "text/html"}) if asked.path == "/" else None


class OtherModels(Chat):
    """A server that speaks OpenAI's API and is none of those that are known."""

    def answer(self, asked: Asked) -> Reply | None:
        if asked.path == "/v1/models":
            return Reply({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "somebody"}]})
        return self.chat(asked.body) if asked.path == "/v1/chat/completions" else None


KINDS = {"ollama": Ollama, "lmstudio": LmStudio, "llamacpp": LlamaCpp, "vllm": Vllm, "website": Website}


async def _main() -> None:
    parser = argparse.ArgumentParser(description="A model server for tests.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", default=[])
    given = parser.parse_args()
    server = KINDS[given.kind](given.port)
    for model in given.model:
        if isinstance(server, Ollama | LmStudio):
            server.pull(model)
        elif isinstance(server, LlamaCpp | Vllm):
            server.model = model
    async with server:
        sys.stdout.write(server.address + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
