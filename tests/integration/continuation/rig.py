"""An ingress and workers, each a process of its own on a real NATS, and a client that notes when each word came."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import openai
from openai.types.chat import ChatCompletionChunk

from bus.connection import Connection, Message
from bus.server import EmbeddedServer
from schemas import subjects
from tests.faults.processes import Command, Member
from tests.faults.proxy import Link
from tests.sdk import sdk
from tests.stopwatch import Stopwatch
from tests.waiting import eventually

MODEL = "echo"
API_KEY = "sk-penstock-for-tests-of-continuation"
TOKENS_PER_S = 50.0
PACE_S = 1 / TOKENS_PER_S
WORDS = 60
TEXT = " ".join(f"word{n}" if n % 7 else "Grüße-世界🙂" for n in range(WORDS))
CONFIG = """\
[worker]
drain_s = {drain_s}

[[routes]]
id = "echo"
provider = "echo"
tokens_per_s = {tokens_per_s}
delay_ms = {delay_ms}
max_concurrency = {slots}

[[routes.models]]
name = "echo"
"""


@dataclass
class Heard:
    """A stream as its client sees it."""

    request_id: str = ""
    chunks: list[ChatCompletionChunk] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)
    waited_s: float = 0.0  # for a processor, from what was done to the worker to the end
    error: openai.APIError | None = None

    @property
    def text(self) -> str:
        return "".join(c.delta.content or "" for chunk in self.chunks for c in chunk.choices)

    @property
    def roles(self) -> int:
        return sum(c.delta.role is not None for chunk in self.chunks for c in chunk.choices)

    @property
    def finish(self) -> list[str]:
        return [c.finish_reason for chunk in self.chunks for c in chunk.choices if c.finish_reason is not None]

    @property
    def usage(self) -> tuple[int, int]:
        last = self.chunks[-1].usage
        assert last is not None
        return last.prompt_tokens, last.completion_tokens

    @property
    def gap_s(self) -> float:
        """The longest time without a word, as its client had it."""
        return max(after - before for before, after in zip(self.at, self.at[1:], strict=False))


class Rig:
    """Processes on one NATS server. Each worker reaches it by a cable of its own."""

    def __init__(self, server: EmbeddedServer, connection: Connection, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.workers: dict[str, Member] = {}
        self.cables: dict[str, Link] = {}
        self._server = server
        self._connection = connection
        self._folder = folder
        self._ingress: Member | None = None
        self.base_url = ""

    async def start(self) -> None:
        await self._connection.listen(subjects.ALL_EVENTS, self._on_page)
        member = Member(
            Command(
                name="ingress-1",
                arguments=("ingress", "--nats", self._server.url, "--port", "0"),
                folder=self._folder,
                environ={"PENSTOCK_API_KEY": API_KEY},
            )
        )
        self._ingress = member
        member.start()
        await member.ready()
        self.base_url = f"http://127.0.0.1:{(member.told() or {})['port']}/v1"

    async def stop(self) -> None:
        for member in (*self.workers.values(), *([] if self._ingress is None else [self._ingress])):
            member.resume()
            await member.kill()
        for cable in self.cables.values():
            await cable.stop()

    async def add_worker(
        self,
        name: str,
        *,
        tokens_per_s: float = TOKENS_PER_S,
        drain_s: float = 0.1,
        slots: int = 8,
        delay_ms: int = 0,
        config: str | None = None,
    ) -> None:
        path = self._folder / f"{name}.toml"
        said = CONFIG.format(tokens_per_s=tokens_per_s, drain_s=drain_s, slots=slots, delay_ms=delay_ms)
        path.write_text(config or said)
        url = urlsplit(self._server.url)
        cable = self.cables[name] = Link(name, int(url.port or 0))
        await cable.start()
        nats_url = f"nats://{url.username}:{url.password}@127.0.0.1:{cable.port}"
        member = self.workers[name] = Member(
            Command(
                name=name,
                arguments=("worker", "--nats", nats_url, "--config", str(path), "--name", name, "--no-discover"),
                folder=self._folder,
            )
        )
        member.start()
        await member.ready()

    async def ask(
        self, *, when: Callable[[Heard], Any] | None = None, after: int = 20, text: str = TEXT, **members: Any
    ) -> Heard:
        """Streams one answer; *when* is called once, with the *after*-th chunk."""
        heard = Heard()
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
            **members,
        }
        async with sdk(self.base_url, API_KEY, timeout_s=60) as client:
            try:
                stream = await client.chat.completions.create(**body)
                heard.request_id = stream.response.headers["x-request-id"]
                async for chunk in stream:
                    heard.chunks.append(chunk)
                    heard.at.append(time.monotonic())
                    if when is not None and len(heard.chunks) == after:
                        heard.watch = Stopwatch()
                        done = when(heard)
                        if hasattr(done, "__await__"):
                            await done
            except openai.APIError as error:
                heard.error = error
        heard.waited_s = heard.watch.waited_s
        return heard

    async def at_work(self, heard: Heard) -> str:
        """The worker that began the last attempt at *heard*. That it did is told a quarter of a second later."""

        def begun() -> str:
            return [e["worker"] for e in self.of_kind("attempt.started") if e["request_id"] == heard.request_id][-1]

        return await eventually(begun, what="who began it")

    async def event(self, kind: str, *, number: int = -1) -> dict[str, Any]:
        return await eventually(lambda: self.of_kind(kind)[number], what=f"a {kind}")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    async def _on_page(self, msg: Message) -> None:
        for line in msg.data.splitlines():
            self.events.append(msgspec.json.decode(line))
