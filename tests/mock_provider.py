"""An OpenAI-compatible server that misbehaves on demand, and remembers what was done to it.

An outside witness: it speaks HTTP over TCP and shares no code with the product. Use it in a test as

    async with MockProvider() as mock:
        mock.script(tokens=3)                     # how it answers from now on
        ... {"model": "m", "messages": [...], "mock": {"status": 500}}     # or how it answers this request
        mock.seen[-1].gone_s                      # when the client went away

or as a program, whose first line is its base URL: ``python tests/mock_provider.py --port 0``. A program is asked and told over
HTTP: ``GET /mock/seen``, ``POST /mock/script``, ``POST /mock/forget``. Times are `time.monotonic`, which processes of one machine
share.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import re
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import msgspec
from msgspec import Struct, field

SEEN_MAX = 20_000  # requests that are remembered
NEVER = 10**9


class Script(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a request is answered. Places count the tokens of the answer: place 0 is before the first one."""

    # what it says
    text: str | None = None  # default: the last user message's text
    tokens: int | None = None  # this many numbered words instead
    reasoning: str | None = None  # said first, as reasoning_content
    arguments: str = "{}"  # of a tool call, when tools are given
    finish_reason: str | None = None
    extra: dict[str, Any] = {}  # further members of every chunk or body
    usage: str = "last"  # last | with_finish | every | never
    # how fast
    delay_s: float = 0.0  # before the status line
    pace_s: float = 0.0  # before each token
    together: bool = False  # the whole stream in one write
    # an answer of another kind
    status: int = 200
    headers: dict[str, str] = {}
    body: str | None = None  # instead of an answer
    content_type: str | None = None
    # going wrong
    reset: bool = False  # the connection, before the status line
    stall_at: int = NEVER  # says no more, and stays; -1 is before the status line
    cut_at: int = NEVER  # resets the connection
    end_at: int = NEVER  # ends the body properly
    error_at: int = NEVER  # says `error` as an event
    error: dict[str, Any] = field(default_factory=lambda: {"message": "it broke", "type": "server_error", "code": 500})
    error_event: str | None = None  # the name of that event
    error_bare: bool = False  # the error is the event's object, not its member `error`
    raw: str | None = None  # this as the body of a stream
    short_by: int = 0  # a body without streaming that lacks this many bytes of its Content-Length
    # odd, but right
    done: bool = True  # [DONE] at the end
    linger: bool = False  # the body does not end after it
    finish: bool = True  # a finish reason at all
    crlf: bool = False
    comments: bool = False
    bom: bool = False
    no_space: bool = False
    multi_line: bool = False  # each event's JSON over several data lines
    no_blank_at_end: bool = False
    split_bytes: int = 0  # the stream in pieces of this size, one write each
    padding_bytes: int = 0  # of a member `padding` in the first chunk


class Seen(Struct, kw_only=True):
    """One request, as it looked from here."""

    path: str
    headers: dict[str, str]  # names in lower case
    raw: str  # the body as it came
    body: Any  # and decoded; None if it isn't JSON
    at_s: float
    connection: int  # which connection it came on
    tokens_sent: int = 0
    finished_s: float | None = None  # the answer was complete
    gone_s: float | None = None  # the client closed before that

    @property
    def key(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


class Quota:
    """So many requests of a key in each window of so many seconds, which begins with the first; told in OpenAI's headers."""

    def __init__(self, requests: int, window_s: float) -> None:
        self._requests = requests
        self._window_s = window_s
        self._began = 0.0
        self._taken = 0
        self.refused = 0

    def take(self) -> dict[str, str] | None:
        """The headers of the answer; None if there is to be none but a 429."""
        now = time.monotonic()
        if now - self._began >= self._window_s:
            self._began, self._taken = now, 0
        if self._taken >= self._requests:
            self.refused += 1
            return None
        self._taken += 1
        return {
            "x-ratelimit-limit-requests": str(self._requests),
            "x-ratelimit-remaining-requests": str(self._requests - self._taken),
            "x-ratelimit-reset-requests": f"{round(1000 * (self._began + self._window_s - now))}ms",
        }


class MockProvider:
    def __init__(self, *, port: int = 0, script: Script | None = None) -> None:
        self.seen: deque[Seen] = deque(maxlen=SEEN_MAX)
        self.connections_open = 0
        self.connections_made = 0
        self.models = ["mock-model"]
        self._port = port
        self._script = script or Script()
        self._by_key: dict[str, Script] = {}
        self._next: deque[Script] = deque()
        self.quotas: dict[str, Quota] = {}  # by key
        self._server: asyncio.Server | None = None
        self._live: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._live):
            await connection.stop()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def script(self, **changes: Any) -> None:
        """How requests without a script of their own are answered from now on; what isn't named is as by default."""
        self._script = Script(**changes)

    def script_key(self, key: str, **changes: Any) -> None:
        """The same for requests that show *key*."""
        self._by_key[key] = Script(**changes)

    def script_next(self, *changes: dict[str, Any]) -> None:
        """How the next requests are answered, one after the other, before what else is said."""
        self._next.extend(Script(**each) for each in changes)

    def forget(self) -> None:
        self.seen.clear()

    @property
    def answering(self) -> int:
        """Requests that are being answered now."""
        return sum(1 for seen in self.seen if seen.finished_s is None and seen.gone_s is None)

    @property
    def tokens_sent(self) -> int:
        return sum(seen.tokens_sent for seen in self.seen)

    def script_for(self, body: Any, key: str) -> Script:
        said = self._next.popleft() if self._next else self._by_key.get(key, self._script)
        if (quota := self.quotas.get(key)) is not None and said.status == 200:
            headers = quota.take()
            said = Script(status=429) if headers is None else msgspec.structs.replace(said, headers=headers)
        own = body.get("mock") if isinstance(body, dict) else None
        return msgspec.convert({**msgspec.to_builtins(said), **own}, Script) if own else said

    def report(self) -> bytes:
        return msgspec.json.encode(
            {
                "requests": list(self.seen),
                "connections_open": self.connections_open,
                "connections_made": self.connections_made,
                "tokens_sent": self.tokens_sent,
                "answering": self.answering,
            }
        )


class _Reset(Exception):
    pass


class _Connection(asyncio.Protocol):
    """One client connection: requests one after the other."""

    _numbers = itertools.count(1)

    def __init__(self, mock: MockProvider) -> None:
        self._mock = mock
        self._number = next(self._numbers)
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._seen: Seen | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is no subclass
        self._mock.connections_open += 1
        self._mock.connections_made += 1
        self._mock._live.add(self)

    def connection_lost(self, _: Exception | None) -> None:
        self._mock.connections_open -= 1
        self._mock._live.discard(self)
        self._writable.set()
        if self._seen is not None and self._seen.finished_s is None:
            self._seen.gone_s = time.monotonic()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    async def stop(self) -> None:
        self._transport.abort()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _next(self) -> None:
        """Begins the next request if it is here as a whole and no other is being answered."""
        if self._task is not None or (end := self._buffer.find(b"\r\n\r\n")) < 0:
            return
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        size = int(headers.get("content-length", "0"))
        if len(self._buffer) < end + 4 + size:
            return
        raw, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
        method, path, _ = lines[0].split(" ", 2)
        self._task = asyncio.get_running_loop().create_task(self._serve(method, path, headers, raw))
        self._task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, _Reset):
            self._abort()
        elif error is not None:
            sys.stderr.write(f"mock provider: {error!r}\n")
            self._abort()
        else:
            self._next()

    def _abort(self) -> None:
        self._seen = None  # it is us who go
        self._transport.abort()

    async def _serve(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        if path.startswith("/mock/"):
            self._control(path, raw)
        elif method == "GET" and path.endswith("/models"):
            self._remember(path, headers, raw, None)
            listed = [{"id": name, "object": "model", "created": 0, "owned_by": "mock"} for name in self._mock.models]
            self._answer(200, msgspec.json.encode({"object": "list", "data": listed}))
        else:
            await self._complete(path, headers, raw)
        if self._seen is not None:
            self._seen.finished_s = time.monotonic()
            self._seen = None

    def _control(self, path: str, raw: bytes) -> None:
        if path == "/mock/script":
            self._mock.script(**msgspec.json.decode(raw))
        elif path == "/mock/forget":
            self._mock.forget()
        self._answer(200, self._mock.report() if path == "/mock/seen" else b"{}")

    def _remember(self, path: str, headers: dict[str, str], raw: bytes, body: Any) -> Seen:
        seen = Seen(
            path=path,
            headers=headers,
            raw=raw.decode(errors="replace"),
            body=body,
            at_s=time.monotonic(),
            connection=self._number,
        )
        self._seen = seen
        self._mock.seen.append(seen)
        return seen

    async def _complete(self, path: str, headers: dict[str, str], raw: bytes) -> None:
        try:
            body = msgspec.json.decode(raw)
        except msgspec.MsgspecError:
            body = None
        seen = self._remember(path, headers, raw, body)
        if not isinstance(body, dict):
            self._answer(400, b'{"error":{"message":"not JSON","type":"invalid_request_error"}}')
            return
        script = self._mock.script_for(body, seen.key)
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
        if script.reset:
            raise _Reset
        if script.stall_at < 0:
            await asyncio.Event().wait()
        if script.body is not None or script.status != 200:
            said = script.body if script.body is not None else msgspec.json.encode({"error": script.error}).decode()
            self._answer(script.status, said.encode(), script.content_type or "application/json", script.headers)
        elif body.get("stream"):
            await self._stream(script, body, seen)
        else:
            await self._whole(script, body, seen)

    async def _whole(self, script: Script, body: dict[str, Any], seen: Seen) -> None:
        answer = _Answer(script, body)
        for place in range(len(answer.pieces)):
            await self._before(place, script)
            seen.tokens_sent += 1
        said = msgspec.json.encode(answer.whole())
        if script.short_by:
            self._answer(200, said[: -script.short_by], length=len(said))
            await asyncio.sleep(0.01)
            raise _Reset
        self._answer(200, said, script.content_type or "application/json", script.headers)

    async def _before(self, place: int, script: Script) -> None:
        if script.pace_s:
            await asyncio.sleep(script.pace_s)
        if place >= script.stall_at:
            await asyncio.Event().wait()
        if place >= script.cut_at:
            raise _Reset

    async def _stream(self, script: Script, body: dict[str, Any], seen: Seen) -> None:
        head = {"content-type": script.content_type or "text/event-stream", "transfer-encoding": "chunked"}
        self._head(200, {**head, **script.headers})
        if script.raw is not None:
            await self._send(script.raw.encode(), script)
        elif script.together:
            pieces = [piece async for piece in self._events(script, body, seen)]
            await self._send(b"".join(pieces), script)
        else:
            async for piece in self._events(script, body, seen):
                await self._send(piece, script)
        if script.linger:
            await asyncio.Event().wait()
        self._transport.write(b"0\r\n\r\n")

    async def _events(self, script: Script, body: dict[str, Any], seen: Seen) -> AsyncIterator[bytes]:
        answer = _Answer(script, body)
        if script.bom:
            yield b"\xef\xbb\xbf"
        for chunk in answer.opening():
            yield _event(chunk, script)
        for place, chunks in enumerate(answer.deltas()):
            await self._before(place, script)
            if place >= script.end_at:
                return
            if place >= script.error_at:
                yield _event(script.error if script.error_bare else {"error": script.error}, script, script.error_event)
                if script.done:
                    yield b"data: [DONE]\n\n"
                return
            seen.tokens_sent += 1
            for chunk in chunks:
                yield _event(chunk, script)
        for chunk in answer.ending():
            yield _event(chunk, script)
        if script.done:
            yield b"data: [DONE]" + (b"" if script.no_blank_at_end else b"\r\n\r\n" if script.crlf else b"\n\n")

    async def _send(self, data: bytes, script: Script) -> None:
        step = script.split_bytes or max(1, len(data))
        for start in range(0, len(data), step):
            await self._writable.wait()
            piece = data[start : start + step]
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if script.split_bytes:
                await asyncio.sleep(0)

    def _answer(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        size = str(len(body) if length is None else length)
        self._head(status, {"content-type": content_type, "content-length": size, **(headers or {})}, body)

    def _head(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items() if value)]
        self._transport.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)


class _Answer:
    """What is said to one request: a text, or a tool call, in tokens; the same for each choice."""

    def __init__(self, script: Script, body: dict[str, Any]) -> None:
        self._script = script
        self._model = str(body.get("model", ""))
        self._choices = range(int(body.get("n") or 1))
        self._tool = _tool(body)
        text = script.text if script.text is not None else _last_user_text(body)
        if script.tokens is not None:
            text = " ".join(f"w{number}" for number in range(script.tokens))
        if self._tool is not None:
            text = script.arguments
        text, stopped = _stop(text, body.get("stop"))
        pieces = re.findall(r"\s?\S+|\s", text)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or NEVER
        self.pieces = pieces[:limit]
        cut = len(pieces) > limit and not stopped
        natural = "length" if cut else "stop" if self._tool is None else "tool_calls"
        self._reason = script.finish_reason or natural
        reasoning = len((script.reasoning or "").split())
        said = (len(self.pieces) + reasoning) * len(self._choices)
        prompt = len(msgspec.json.encode(body.get("messages"))) // 4
        self._usage = {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": prompt // 2},
            "completion_tokens_details": {"reasoning_tokens": reasoning * len(self._choices)},
        }
        options = body.get("stream_options")
        self._wants_usage = isinstance(options, dict) and options.get("include_usage") is True

    def whole(self) -> dict[str, Any]:
        text = "".join(self.pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._tool is not None:
            call = {"id": "call_mock", "type": "function", "function": {"name": self._tool, "arguments": text}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        if self._script.reasoning is not None:
            message["reasoning_content"] = self._script.reasoning
        choices = [
            {"index": index, "message": message, "logprobs": None, "finish_reason": self._reason}
            for index in self._choices
        ]
        usage = None if self._script.usage == "never" else self._usage
        return {**self._common("chat.completion"), "choices": choices, "usage": usage, **self._script.extra}

    def opening(self) -> Iterator[dict[str, Any]]:
        padding = {"padding": "x" * self._script.padding_bytes} if self._script.padding_bytes else {}
        for index in self._choices:
            yield {
                **self._chunk(index, {"role": "assistant", "content": "" if self._tool is None else None}),
                **padding,
            }
        if self._script.reasoning is not None:
            for index, piece in itertools.product(self._choices, re.findall(r"\s?\S+", self._script.reasoning)):
                yield self._chunk(index, {"reasoning_content": piece})
        if self._tool is not None:
            inner = {"name": self._tool, "arguments": ""}
            for index in self._choices:
                call = {"index": 0, "id": "call_mock", "type": "function", "function": inner}
                yield self._chunk(index, {"tool_calls": [call]})

    def deltas(self) -> Iterator[list[dict[str, Any]]]:
        for piece in self.pieces:
            delta: dict[str, Any] = {"content": piece}
            if self._tool is not None:
                delta = {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
            yield [self._chunk(index, delta) for index in self._choices]

    def ending(self) -> Iterator[dict[str, Any]]:
        for index in self._choices if self._script.finish else ():
            chunk = self._chunk(index, {}, finish=self._reason)
            if self._script.usage == "with_finish" and self._wants_usage:
                chunk["usage"] = self._usage
            yield chunk
        if self._script.usage == "last" and self._wants_usage:
            yield {**self._common("chat.completion.chunk"), "choices": [], "usage": self._usage}

    def _chunk(self, index: int, delta: dict[str, Any], *, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = self._usage if self._script.usage == "every" else None
        return {
            **self._common("chat.completion.chunk"),
            "choices": [choice],
            **({"usage": usage} if self._wants_usage else {}),
            **self._script.extra,
        }

    def _common(self, kind: str) -> dict[str, Any]:
        return {
            "id": "chatcmpl-mock",
            "object": kind,
            "created": 1_700_000_000,
            "model": self._model,
            "system_fingerprint": "fp_mock",
        }


def _tool(body: dict[str, Any]) -> str | None:
    """The function that is called: the one that is asked for, else the first; none after a tool's result."""
    choice, tools = body.get("tool_choice"), body.get("tools")
    if not tools or choice == "none" or body["messages"][-1].get("role") == "tool":
        return None
    named = choice["function"]["name"] if isinstance(choice, dict) else tools[0]["function"]["name"]
    return str(named)


def _last_user_text(body: dict[str, Any]) -> str:
    for message in reversed(body.get("messages") or []):
        if message.get("role") in ("user", "tool"):
            content = message.get("content")
            if isinstance(content, list):
                return " ".join(str(part.get("text", "")) for part in content)
            return str(content or "")
    return ""


def _stop(text: str, stop: str | list[str] | None) -> tuple[str, bool]:
    signs = [stop] if isinstance(stop, str) else stop or []
    places = [place for sign in signs if (place := text.find(sign)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _event(said: dict[str, Any], script: Script, name: str | None = None) -> bytes:
    encoded = msgspec.json.encode(said)
    lines = msgspec.json.format(encoded, indent=1).split(b"\n") if script.multi_line else [encoded]
    prefix = b"data:" if script.no_space else b"data: "
    end = b"\r\n" if script.crlf else b"\n"
    head = [b": a comment", b"id: 7", b"retry: 100"] if script.comments else []
    if script.comments:
        head = [b": keep-alive", b"", *head]
    if name is not None:
        head.append(b"event: " + name.encode())
    return end.join([*head, *(prefix + line for line in lines), b"", b""])


async def _main() -> None:
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server for tests.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script", default="{}", help="how it answers, as JSON")
    given = parser.parse_args()
    script = msgspec.json.decode(given.script, type=Script)
    async with MockProvider(port=given.port, script=script) as mock:
        sys.stdout.write(mock.base_url + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        try:
            import uvloop
        except ImportError:
            asyncio.run(_main())
        else:
            uvloop.run(_main())
