"""A mock provider: a program that speaks OpenAI's chat completions as fast as Python can, and counts what it served.

It stands in for the cloud during a benchmark, so it must never be the bottleneck: answers are rendered once at start, a
request is only parsed as far as `stream` and `stream_options`. Each chunk of a stream is a write of its own, as it is
where tokens come one by one; `--burst` sends a whole stream in one write instead.
`GET /stats` is the outside witness: what a gateway's ledger says must equal what was generated here.

    python -m bench.provider --port 8001 --chunks 16 --chunk-delay-ms 20
    curl -s 127.0.0.1:8001/stats
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import cast

import click
import msgspec
import uvloop

HEAD_LIMIT_BYTES = 64 * 1024
BODY_LIMIT_BYTES = 32 * 1024 * 1024
PROMPT_TOKENS = 24
MODEL = "bench-model"
WORD = "tok"  # every generated token carries it, so a client can count what reached it
CREATED_S = 1_760_000_000


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct):
    """The part of a request that decides the shape of the answer."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Stats(msgspec.Struct):
    """Chat completions only: what was asked, generated and cut short since the start."""

    requests: int = 0
    streams: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: int = 0  # streams whose client left before the end
    refused: int = 0  # requests that were answered with an error


class Answers:
    """Every byte the provider can say, rendered once."""

    def __init__(self, *, chunks: int) -> None:
        tokens = [f" {WORD}{n:03d}" for n in range(chunks)]
        usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": chunks,
            "total_tokens": PROMPT_TOKENS + chunks,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }
        message = {"role": "assistant", "content": "".join(tokens), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        completion = {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": CREATED_S,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
            "system_fingerprint": "fp_bench",
        }
        model = {"id": MODEL, "object": "model", "created": CREATED_S, "owned_by": "bench"}
        first = [{"role": "assistant", "content": token} for token in tokens[:1]]
        deltas = first + [{"content": token} for token in tokens[1:]]
        self.whole = response(completion)
        self.models = response({"object": "list", "data": [model]})
        self.bad = response(problem("the body is not a chat completion request"), status="400 Bad Request")
        self.lost = response(problem("no such path"), status="404 Not Found")
        self.too_large = response(problem("too large"), status="413 Content Too Large")
        self.stream_head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        done = http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        end: dict[str, object] = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        self.events: dict[bool, list[bytes]] = {}
        for with_usage in (False, True):
            extra: dict[str, object] = {"usage": None} if with_usage else {}
            events = [
                sse_chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}], **extra)
                for delta in deltas
            ]
            events.append(sse_chunk([end], **extra))
            if with_usage:
                events.append(sse_chunk([], usage=usage))
            events[-1] += done
            self.events[with_usage] = events
        self.streams = {key: self.stream_head + b"".join(events) for key, events in self.events.items()}


class Provider(asyncio.Protocol):
    """One connection. Requests on it are answered in order; a stream that is paced holds the next one back."""

    def __init__(
        self, answers: Answers, stats: Stats, *, chunks: int, first_delay_s: float, chunk_delay_s: float, burst: bool
    ) -> None:
        self.answers = answers
        self.stats = stats
        self.chunks = chunks
        self.first_delay_s = first_delay_s
        self.chunk_delay_s = chunk_delay_s
        self.burst = burst
        self.loop = asyncio.get_running_loop()
        self.decode = msgspec.json.Decoder(ChatRequest).decode
        self.buffer = bytearray()
        self.next: asyncio.Handle | None = None  # what is still to be said of the answer under way
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self.next is not None:
            self.next.cancel()
            self.next = None
            self.stats.cut += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while self.next is None and self.answer_one():
            pass

    def answer_one(self) -> bool:
        """Answer the first whole request of the buffer. False when there is none yet."""
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self.buffer) > HEAD_LIMIT_BYTES:
                self.refuse(self.answers.too_large)
            return False
        head = bytes(self.buffer[:end])
        length = content_length(head)
        if length > BODY_LIMIT_BYTES:
            self.refuse(self.answers.too_large)
            return False
        until = end + 4 + length
        if len(self.buffer) < until:
            return False
        body = bytes(self.buffer[end + 4 : until])
        del self.buffer[:until]
        self.route(head, body)
        return True

    def route(self, head: bytes, body: bytes) -> None:
        line = head[: head.find(b"\r\n")]
        if line.startswith(b"POST /v1/chat/completions "):
            self.chat(body)
        elif line.startswith(b"GET /v1/models "):
            self.transport.write(self.answers.models)
        elif line.startswith(b"GET /stats "):
            self.transport.write(response(self.stats))
        else:
            self.transport.write(self.answers.lost)

    def chat(self, body: bytes) -> None:
        try:
            request = self.decode(body)
        except msgspec.MsgspecError:
            self.stats.refused += 1
            self.transport.write(self.answers.bad)
            return
        self.stats.requests += 1
        self.stats.prompt_tokens += PROMPT_TOKENS
        if not request.stream:
            if self.first_delay_s:
                self.after(self.first_delay_s, self.send_whole)
            else:
                self.send_whole()
            return
        self.stats.streams += 1
        options = request.stream_options
        with_usage = bool(options is not None and options.include_usage)
        if self.burst:
            self.stats.completion_tokens += self.chunks
            self.transport.write(self.answers.streams[with_usage])
            return
        self.transport.write(self.answers.stream_head)
        self.after(self.first_delay_s, self.send_event, 0, with_usage)

    def send_whole(self) -> None:
        self.stats.completion_tokens += self.chunks
        self.transport.write(self.answers.whole)

    def send_event(self, number: int, with_usage: bool) -> None:
        """Send one event of a paced stream, and what follows the last token in one write with the end."""
        events = self.answers.events[with_usage]
        if number < self.chunks:
            self.stats.completion_tokens += 1
            self.transport.write(events[number])
            self.after(self.chunk_delay_s, self.send_event, number + 1, with_usage)
            return
        self.transport.write(b"".join(events[number:]))

    def after(self, delay_s: float, say: Callable[..., None], *args: object) -> None:
        """Go on after *delay_s*, or in the event loop's next turn, so that what is written meanwhile is another write."""
        if delay_s:
            self.next = self.loop.call_later(delay_s, self.resume, say, *args)
        else:
            self.next = self.loop.call_soon(self.resume, say, *args)

    def resume(self, say: Callable[..., None], *args: object) -> None:
        self.next = None
        say(*args)
        while self.next is None and self.answer_one():
            pass

    def refuse(self, answer: bytes) -> None:
        self.stats.refused += 1
        self.transport.write(answer)
        self.transport.close()


async def start(
    *, port: int = 0, chunks: int = 16, first_delay_s: float = 0.0, chunk_delay_s: float = 0.0, burst: bool = False
) -> asyncio.Server:
    """Listen on the loopback address; `server.sockets[0].getsockname()[1]` is the port."""
    answers, stats = Answers(chunks=chunks), Stats()

    def connection() -> Provider:
        return Provider(
            answers, stats, chunks=chunks, first_delay_s=first_delay_s, chunk_delay_s=chunk_delay_s, burst=burst
        )

    return await asyncio.get_running_loop().create_server(connection, "127.0.0.1", port, backlog=1024)


def response(body: object, *, status: str = "200 OK") -> bytes:
    payload = msgspec.json.encode(body)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


def problem(message: str) -> dict[str, object]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def sse_chunk(choices: list[dict[str, object]], **extra: object) -> bytes:
    event = {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": CREATED_S,
        "model": MODEL,
        "system_fingerprint": "fp_bench",
        "choices": choices,
        **extra,
    }
    return http_chunk(b"data: " + msgspec.json.encode(event) + b"\n\n")


def http_chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def content_length(head: bytes) -> int:
    """The body's length in bytes; 0 when the head names none (a GET), for chunked bodies are not spoken here."""
    lower = head.lower()
    at = lower.find(b"\r\ncontent-length:")
    if at < 0:
        return 0
    value = lower[at + 17 :].split(b"\r\n", 1)[0].strip()
    return int(value) if value.isdigit() else BODY_LIMIT_BYTES + 1


async def serve(server: Awaitable[asyncio.Server], *, until_eof: bool) -> None:
    listening = await server
    print(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", flush=True)
    if until_eof:  # whoever started it holds the other end: when they die, however they die, it ends too
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
        return
    await listening.serve_forever()


@click.command(help=__doc__.split("\n\n", 1)[0], epilog="Example: python -m bench.provider --port 8001 --chunks 100")
@click.option("--port", default=0, show_default=True, help="0: any free port; the base URL is printed.")
@click.option("--chunks", default=16, show_default=True, help="Tokens in an answer, one a chunk.")
@click.option("--first-delay-ms", default=0.0, show_default=True, help="Before the first token.")
@click.option("--chunk-delay-ms", default=0.0, show_default=True, help="After each token of a stream.")
@click.option("--burst", is_flag=True, help="A whole stream in one write.")
@click.option("--until-eof", is_flag=True, help="Stop when standard input is closed.")
def main(*, port: int, chunks: int, first_delay_ms: float, chunk_delay_ms: float, burst: bool, until_eof: bool) -> None:
    server = start(
        port=port,
        chunks=chunks,
        first_delay_s=first_delay_ms / 1000,
        chunk_delay_s=chunk_delay_ms / 1000,
        burst=burst,
    )
    uvloop.run(serve(server, until_eof=until_eof))


if __name__ == "__main__":
    main()
