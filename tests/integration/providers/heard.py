"""An answer as it was heard, put together again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from schemas.jobs import Job
from workers.providers.base import Chunk, Provider


@dataclass
class Voice:
    """One choice."""

    text: str = ""
    role: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)

    @property
    def called(self) -> list[tuple[str, str]]:
        return [(call["function"]["name"], call["function"]["arguments"]) for call in self.calls]


@dataclass
class Heard:
    chunks: list[Chunk]
    voices: dict[int, Voice]

    @property
    def text(self) -> str:
        return self.voices[0].text

    @property
    def pieces(self) -> list[bytes]:
        return [piece for chunk in self.chunks for piece in chunk.pieces]

    @property
    def usages(self) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.usage is not None]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)


async def hear(provider: Provider, job: Job) -> Heard:
    heard = Heard([], {})
    async for chunk in provider.generate(job):
        heard.chunks.append(chunk)
        for choice in [choice for piece in chunk.pieces for choice in json.loads(piece)["choices"]]:
            _take(heard.voices.setdefault(choice["index"], Voice()), choice, streamed=job.stream)
    return heard


def _take(voice: Voice, choice: dict[str, Any], *, streamed: bool) -> None:
    said = choice["delta" if streamed else "message"]
    assert not voice.finish, "a choice goes on after its finish reason"
    voice.role = said.get("role", voice.role)
    voice.text += said.get("content") or ""
    for call in said.get("tool_calls") or ():
        if not streamed:
            voice.calls.append(call)
        elif call["index"] == len(voice.calls):
            assert not call["function"].get("arguments"), "the first piece of a call has its name and no arguments"
            function = {"arguments": "", **call["function"]}  # vLLM leaves it away in the piece that has the name
            voice.calls.append({"id": call["id"], "type": call["type"], "function": function})
        else:
            voice.calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if choice.get("finish_reason") is not None:
        voice.finish.append(choice["finish_reason"])
