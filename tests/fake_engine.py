"""A model server with vLLM's command line and no model: it says back what it is told, and misbehaves on demand.

    fake_engine.py serve MODEL --uds PATH [--fake-…] [any flag of vLLM's]

An outside witness: the standard library alone, and no code of the product. A message that is `crash` ends the process in the
middle of the answer; `endless` gets an answer that goes on for ever; `die` ends it as vLLM does when its engine process is
killed: the answers end with an error, /health is 503, and the front end goes on for a while; `hang up` breaks off.
Flags are told back as a line of the log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

PACE_S = 0.005  # between the tokens of an endless answer
BODY_BYTES_MAX = 1024 * 1024
DEAD = {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "param": None, "code": 500}
METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} RUNNING.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 200.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
vllm:cache_config_info{block_size="16",engine="0",kv_cache_size_tokens="4096",num_gpu_blocks="256"} 1.0
"""
METRICS_AT = ("/metrics", "/metrics/")  # behind the slash it tells what it is asked for by name, or else everything
CHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"


class FakeEngine:
    def __init__(
        self,
        *,
        token_ids: bool = True,
        priority: bool = True,
        strict: bool = False,
        metrics: tuple[str, ...] = METRICS_AT,
    ) -> None:
        """*strict* refuses what it doesn't know. Without *token_ids*, or *priority*, it doesn't know of these. *metrics* are
        the paths at which it tells its numbers."""
        self.known = {"return_token_ids": token_ids, "priority": priority}
        self.strict = strict
        self.metrics = metrics
        self.dead = False
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []  # asked, without the queries
        self.streams: set[asyncio.StreamWriter] = set()
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    async def aclose(self) -> None:
        """Breaks the connections that are still open, and returns when nothing is left of them."""
        tasks = [task for task in self._open.values() if task is not None]
        for writer in self._open:
            writer.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # in which a transport that was aborted closes its socket

    async def on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open[writer] = asyncio.current_task()
        try:
            await self._answer(reader, writer)
        finally:
            del self._open[writer]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, target, _ = head.split(" ", 2)
            path, _, query = target.partition("?")
            self.paths.append(path)
            length = next((int(line[15:]) for line in head.splitlines() if line.lower()[:15] == "content-length:"), 0)
            body = json.loads(await reader.readexactly(min(length, BODY_BYTES_MAX)) or b"{}")
            if method == "POST" and path.endswith("/chat/completions"):
                await self._chat(body, writer)
            elif path == "/health":
                await _say(writer, {}, status=503 if self.dead else 200)
            elif path == "/v1/models":
                await _say(writer, {"data": [{"id": "m", "root": "org/m", "max_model_len": 512}]})
            elif path in self.metrics:
                told = METRICS.replace("RUNNING", str(len(self.streams)))
                await _say(writer, _chosen(told, parse_qs(query).get("name[]", [])) if path.endswith("/") else told)
            else:
                await _say(writer, {"error": {"message": "no such path"}}, status=404)
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def _chat(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        if self.dead:
            await _say(writer, {"error": DEAD}, status=500)
            return
        for name, known in self.known.items():
            if self.strict and name in body and not known:
                await _say(writer, {"error": {"message": "unknown field", "param": name}}, status=400)
                return
        with_ids = self.known["return_token_ids"] and body.get("return_token_ids") is True
        text = body["messages"][-1]["content"]
        words = text.split()[: body.get("max_tokens")]
        prompt_ids = list(range(len(words))) if with_ids else None
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        if not body.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            if with_ids:
                choice["token_ids"] = [100 + at for at in range(len(words))]
            await _say(writer, {"id": "c", "choices": [choice], "usage": usage, "prompt_token_ids": prompt_ids})
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        self.streams.add(writer)
        try:
            await self._stream(body, writer, with_ids=with_ids)
        finally:
            self.streams.discard(writer)

    async def _stream(self, body: dict[str, Any], writer: asyncio.StreamWriter, *, with_ids: bool) -> None:
        text = body["messages"][-1]["content"]
        words = text.split()[: body.get("max_tokens")]
        prompt_ids = list(range(len(words))) if with_ids else None
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        at = 0
        async for word in self._spoken(text, words):
            choice = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
            if with_ids:
                choice["token_ids"] = [100 + at]
            await _event(writer, {"id": "c", "choices": [choice], **({} if at else {"prompt_token_ids": prompt_ids})})
            at += 1
        if self.dead:
            await _event(writer, {"error": DEAD})
            writer.write(b"data: [DONE]\n\n")
            return
        await _event(writer, {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        await _event(writer, {"id": "c", "choices": [], "usage": usage})
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()

    async def _spoken(self, text: str, words: list[str]) -> AsyncIterator[str]:
        for at, word in enumerate(words):
            yield f" {word}" if at else word
        if text == "crash":
            os._exit(0)  # vLLM's front end says 0, too, when its engine has died
        if text == "hang up":
            raise ConnectionError
        self.dead = self.dead or text == "die"
        while text == "endless" and not self.dead:
            await asyncio.sleep(PACE_S)
            yield " more"


async def _say(writer: asyncio.StreamWriter, answer: dict[str, Any] | str, *, status: int = 200) -> None:
    text = isinstance(answer, str)
    body = (answer if isinstance(answer, str) else json.dumps(answer, separators=(",", ":"))).encode()
    kind = "text/plain" if text else "application/json"
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
    writer.write(f"{head}connection: close\r\n\r\n".encode() + body)
    await writer.drain()


async def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    writer.write(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
    await writer.drain()


@contextlib.asynccontextmanager
async def fake_engine(**wanted: Any) -> AsyncIterator[tuple[FakeEngine, str]]:
    """One in this process, on a port; and its base URL."""
    engine = FakeEngine(**wanted)
    server = await asyncio.start_server(engine.on_connection, "127.0.0.1", 0)
    yield engine, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    server.close()
    await engine.aclose()
    await server.wait_closed()


def _chosen(metrics: str, names: list[str]) -> str:
    return "".join(line for line in metrics.splitlines(keepends=True) if not names or line.partition("{")[0] in names)


def _log(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


async def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--fake-start-s", type=float, default=0.0)
    parser.add_argument("--fake-say", action="append", default=[], help="a line of the log, in this order")
    parser.add_argument("--fake-flood", type=int, default=0, help="so many bytes of log")
    parser.add_argument("--fake-gate", type=Path, help="it ends at once while this file exists")
    parser.add_argument("--fake-stuck", action="store_true", help="it is never healthy")
    parser.add_argument("--fake-child", action="store_true", help="it has a child that SIGTERM doesn't end")
    parser.add_argument("--fake-deaf", action="store_true", help="SIGTERM doesn't end it either")
    args, others = parser.parse_known_args()
    _log("flags", *others)
    for line in args.fake_say:
        _log(line)
    if args.fake_gate is not None and args.fake_gate.exists():
        sys.exit("the gate is shut")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, (lambda: None) if args.fake_deaf else stop.set)
    if args.fake_child:
        await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD)
    _log("x" * args.fake_flood)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), args.fake_start_s)
    if not args.fake_stuck:
        await asyncio.start_unix_server(FakeEngine().on_connection, args.uds)
    await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
