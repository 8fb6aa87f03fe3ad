"""A load generator: N keep-alive connections in a closed loop, every answer verified, as little CPU as Python allows.

Each connection sends its next request when the last answer is complete. What completes between the warm-up and the end of
the window is counted; what is still under way then is waited for and verified too. A request fails on any status but
200, a missing token, a wrong number of chunks, a stream that does not end with [DONE], a closed connection or a time-out.

    BENCH_API_KEY=sk-… python -m bench.load --url http://127.0.0.1:8001/v1 --shape stream --connections 32 --seconds 5
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast
from urllib.parse import urlsplit

import click
import msgspec
import uvloop

from bench.provider import MODEL
from bench.wire import number_bytes, request_bytes, status_of, stream_problem, usage_problem, whole_problem

Shape = Literal["whole", "stream", "mixed"]

REQUEST_TIMEOUT_S = 30.0
FAILED_LIMIT = 100  # a run with so many failures is over: nothing it measures means anything
RECONNECT_DELAY_S = 0.05
KEY_VARIABLE = "BENCH_API_KEY"
WATCH_S = 1.0


class Window(msgspec.Struct, kw_only=True):
    """What one run measured. Latencies in ms, of the requests completed within the window."""

    shape: Shape
    connections: int
    seconds: float
    completed: int
    failed: int
    rate: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    longest_ms: float  # of every answer, the warm-up and the tail included: a stall is seen here
    first_p50_ms: float  # send to first chunk; streams only, else 0
    first_p99_ms: float
    total: int  # every verified answer, the warm-up and the tail included
    total_streams: int
    cpu_s: float  # of the load generator itself, over the window
    errors: dict[str, int]  # reason → how often


@dataclass(slots=True)
class Plan:
    """What to send and when to stop: after *seconds*, or after *requests* when that is not 0."""

    host: str
    port: int
    whole: bytes  # the request without its number, which is appended: every prompt is another one
    stream: bytes
    shape: Shape
    chunks: int
    warmup_s: float
    seconds: float
    requests: int
    tokens: int | None = None  # a real engine's answers, told by their usage; *chunks* says nothing then


@dataclass(slots=True)
class Tally:
    sent: int = 0
    total: int = 0
    total_streams: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    counting: bool = False
    stopping: bool = False
    longest_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    firsts_s: list[float] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        self.failed += 1
        self.errors[reason] = self.errors.get(reason, 0) + 1
        self.stopping = self.stopping or self.failed >= FAILED_LIMIT


class Connection(asyncio.Protocol):
    """One client. At most one request is under way on it."""

    __slots__ = (
        "begun_s",
        "body_at",
        "buffer",
        "closed",
        "first_s",
        "on_left",
        "plan",
        "streams",
        "tally",
        "transport",
    )

    def __init__(self, plan: Plan, tally: Tally, on_left: Callable[["Connection", str], None]) -> None:
        self.plan = plan
        self.tally = tally
        self.on_left = on_left  # called once, with the reason or ""
        self.buffer = bytearray()
        self.begun_s = 0.0  # 0: no request under way
        self.first_s = 0.0
        self.body_at = 0
        self.closed = False
        self.streams = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.send()

    def send(self) -> None:
        tally, plan = self.tally, self.plan
        if tally.stopping or (plan.requests and tally.sent >= plan.requests):
            self.leave("")
            return
        self.streams = plan.shape == "stream" or (plan.shape == "mixed" and tally.sent % 2 == 1)
        self.buffer.clear()
        self.body_at = 0
        self.first_s = 0.0
        tally.sent += 1
        self.begun_s = time.perf_counter()
        self.transport.write((plan.stream if self.streams else plan.whole) + number_bytes(tally.sent))

    def data_received(self, data: bytes) -> None:
        if not self.begun_s:
            self.leave("bytes nobody asked for")
            return
        buffer = self.buffer
        buffer += data
        if not self.first_s and self.streams and b"data: {" in buffer:
            self.first_s = time.perf_counter()
        if not self.body_at:
            self.body_at = buffer.find(b"\r\n\r\n") + 4
            if self.body_at < 4:
                self.body_at = 0
                return
        if self.streams:
            # quick look first: a stream's end is the last chunk of a chunked body
            if buffer.endswith(b"0\r\n\r\n"):
                plan = self.plan
                self.complete(
                    stream_problem(buffer, self.body_at, plan.chunks)
                    if plan.tokens is None
                    else usage_problem(buffer, self.body_at, plan.tokens)
                )
            elif not buffer.startswith(b"HTTP/1.1 200"):
                self.complete(status_of(buffer))
            return
        problem = whole_problem(buffer, self.body_at, self.plan.chunks)
        if problem is not None:
            self.complete(problem)

    def complete(self, problem: str) -> None:
        now_s = time.perf_counter()
        if problem:
            self.leave(problem)
            return
        tally = self.tally
        tally.total += 1
        tally.total_streams += self.streams
        took_s = now_s - self.begun_s
        tally.longest_s = max(tally.longest_s, took_s)
        if tally.counting:
            tally.latencies_s.append(took_s)
            if self.first_s:
                tally.firsts_s.append(self.first_s - self.begun_s)
        self.begun_s = 0.0
        self.send()

    def check(self, now_s: float) -> None:
        if self.begun_s and now_s - self.begun_s > REQUEST_TIMEOUT_S:
            self.leave(f"no answer within {REQUEST_TIMEOUT_S:.0f} s")

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave(f"connection closed ({type(exc).__name__ if exc else 'by the server'})")

    def leave(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        self.begun_s = 0.0
        self.transport.close()
        self.on_left(self, reason)


async def run_load(plan: Plan, *, connections: int) -> Window:
    """Drive *connections* clients through the plan and say what was measured."""
    tally = Tally()
    crowd = Crowd(plan, tally)
    for _ in range(connections):
        crowd.join()
    clock = asyncio.create_task(crowd.watch())
    if not plan.requests:
        await crowd.all_idle(plan.warmup_s)
    tally.counting = True
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    await crowd.all_idle(None if plan.requests else plan.seconds)
    tally.counting = False
    seconds, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
    tally.stopping = True
    await crowd.all_idle(None)
    clock.cancel()
    return summary(plan, tally, connections=connections, seconds=seconds, cpu_s=cpu_s)


class Crowd:
    """The connections of one run: joins them, replaces those that fail, knows when all are idle."""

    def __init__(self, plan: Plan, tally: Tally) -> None:
        self.plan = plan
        self.tally = tally
        self.open: set[Connection] = set()
        self.joining: set[asyncio.Task[None]] = set()
        self.idle = asyncio.Event()

    def join(self, delay_s: float = 0.0) -> None:
        task = asyncio.ensure_future(self.connect(delay_s))
        self.joining.add(task)
        task.add_done_callback(self.joined)

    async def connect(self, delay_s: float) -> None:
        if delay_s:
            await asyncio.sleep(delay_s)
        loop, plan = asyncio.get_running_loop(), self.plan
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(plan, self.tally, self.left), plan.host, plan.port
            )
        except OSError as error:
            self.tally.fail(f"cannot connect ({type(error).__name__})")
            self.tally.stopping = True
            return
        if not connection.closed:
            self.open.add(connection)

    def joined(self, task: asyncio.Task[None]) -> None:
        self.joining.discard(task)
        self.settle()

    def left(self, connection: Connection, reason: str) -> None:
        """A connection sends no more: its work is done, or it failed for *reason* and another takes its place."""
        self.open.discard(connection)
        if reason:
            self.tally.fail(reason)
            if not self.tally.stopping:
                self.join(RECONNECT_DELAY_S)
        self.settle()

    def settle(self) -> None:
        if not self.open and not self.joining:
            self.idle.set()

    async def all_idle(self, timeout_s: float | None) -> None:
        """Return when nothing is under way any more, at the latest after *timeout_s*."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.idle.wait()

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            now_s = time.perf_counter()
            for connection in list(self.open):
                connection.check(now_s)


def summary(plan: Plan, tally: Tally, *, connections: int, seconds: float, cpu_s: float) -> Window:
    latencies_s = sorted(tally.latencies_s)
    firsts_s = sorted(tally.firsts_s)
    return Window(
        shape=plan.shape,
        connections=connections,
        seconds=seconds,
        completed=len(latencies_s),
        failed=tally.failed,
        rate=len(latencies_s) / seconds,
        p50_ms=percentile(latencies_s, 0.5) * 1000,
        p90_ms=percentile(latencies_s, 0.9) * 1000,
        p99_ms=percentile(latencies_s, 0.99) * 1000,
        longest_ms=tally.longest_s * 1000,
        first_p50_ms=percentile(firsts_s, 0.5) * 1000,
        first_p99_ms=percentile(firsts_s, 0.99) * 1000,
        total=tally.total,
        total_streams=tally.total_streams,
        cpu_s=cpu_s,
        errors=tally.errors,
    )


def percentile(ordered: list[float], share: float) -> float:
    """The value below which *share* of the ordered values lie (nearest rank); 0 of none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def make_plan(
    url: str,
    api_key: str,
    *,
    shape: Shape,
    seconds: float = 6.0,
    warmup_s: float = 1.0,
    requests: int = 0,
    chunks: int = 16,
    model: str = MODEL,
    tokens: int | None = None,
) -> Plan:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    path = parts.path.rstrip("/") + "/chat/completions"
    return Plan(
        host=host,
        port=port,
        whole=request_bytes(f"{host}:{port}", path, api_key=api_key, model=model, stream=False),
        stream=request_bytes(f"{host}:{port}", path, api_key=api_key, model=model, stream=True, tokens=tokens),
        shape=shape,
        chunks=chunks,
        warmup_s=warmup_s,
        seconds=seconds,
        requests=requests,
        tokens=tokens,
    )


@click.command(help=__doc__.split("\n\n", 1)[0], epilog=f"The key is read from {KEY_VARIABLE}.")
@click.option("--url", required=True, help="Base URL, ending in /v1.")
@click.option("--shape", type=click.Choice(["whole", "stream", "mixed"]), default="whole", show_default=True)
@click.option("--connections", type=click.IntRange(1, 1024), default=32, show_default=True)
@click.option("--seconds", default=6.0, show_default=True, help="The window that is measured.")
@click.option("--warmup", default=1.0, show_default=True, help="Seconds before the window.")
@click.option("--requests", default=0, show_default=True, help="Stop after so many instead.")
@click.option("--chunks", default=16, show_default=True, help="Tokens an answer must have.")
@click.option("--model", default=MODEL, show_default=True)
@click.option("--tokens", type=int, help="Streams of a real engine: so many tokens each, told by their usage.")
def main(
    *,
    url: str,
    shape: Shape,
    connections: int,
    seconds: float,
    warmup: float,
    requests: int,
    chunks: int,
    model: str,
    tokens: int | None,
) -> None:
    plan = make_plan(
        url,
        os.environ.get(KEY_VARIABLE, "none"),
        shape=shape,
        seconds=seconds,
        warmup_s=warmup,
        requests=requests,
        chunks=chunks,
        model=model,
        tokens=tokens,
    )
    window = uvloop.run(run_load(plan, connections=connections))
    print(msgspec.json.encode(window).decode())
    raise SystemExit(1 if window.failed else 0)


if __name__ == "__main__":
    main()
