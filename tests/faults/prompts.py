"""What is asked and answered in this suite, so that whoever reads an answer can tell where each word of it comes from.

A prompt names itself, and how long and how fast its answer is to be. A word of an answer names its prompt, its place, and the
generation that said it: `b3-17:5:2` is word 5 of the answer to b3-17, said by the second generation for it.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple, Self

ORG = "default"
PROMPT_TOKENS_MIN = 10
BYTES_PER_ESTIMATED_TOKEN = 4  # of a prompt that no provider has counted: docs/adr/0009

_PROMPT = re.compile(r"([a-z0-9-]{1,12}) words=(\d+) pace_ms=(\d+)")
_WORD = re.compile(r"([a-z0-9-]+):(\d+):(\d+)")


class Prompt(NamedTuple):
    name: str  # unique in a run
    words: int
    pace_ms: int

    @classmethod
    def read(cls, text: str) -> Self | None:
        """None if it is not one of ours."""
        found = _PROMPT.fullmatch(text)
        return None if found is None else cls(found[1], int(found[2]), int(found[3]))

    @property
    def text(self) -> str:
        return f"{self.name} words={self.words} pace_ms={self.pace_ms}"

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.text}]

    @property
    def hash(self) -> str:
        """The prompt's hash as the ledger has it: over the org and the messages as the SDK sends them."""
        return hashlib.sha256(ORG.encode() + b"\0" + self._sent).hexdigest()

    @property
    def tokens(self) -> int:
        """How many the provider says that the prompt has."""
        return PROMPT_TOKENS_MIN + len(self.name)

    @property
    def cached_tokens(self) -> int:
        return self.tokens // 2

    @property
    def estimated_tokens(self) -> int:
        """How many it has for those who can't ask the provider."""
        return len(self._sent) // BYTES_PER_ESTIMATED_TOKEN

    @property
    def _sent(self) -> bytes:
        return json.dumps(self.messages, ensure_ascii=False, separators=(",", ":")).encode()


class Word(NamedTuple):
    prompt: str
    place: int
    generation: int

    @classmethod
    def read(cls, text: str) -> Self | None:
        found = _WORD.fullmatch(text)
        return None if found is None else cls(found[1], int(found[2]), int(found[3]))

    @property
    def piece(self) -> str:
        """The word as a token: all but the first have the space before them."""
        return f"{' ' if self.place else ''}{self.prompt}:{self.place}:{self.generation}"
