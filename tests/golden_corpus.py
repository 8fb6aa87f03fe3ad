"""The corpus of stored events: ``golden/<kind>.v<version>.jsonl``, the bytes as they were written, one event a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent / "golden"
_NAME = re.compile(r"(.+)\.v(\d+)\.jsonl")


class Golden(NamedTuple):
    kind: str
    version: int
    lines: tuple[bytes, ...]

    def __str__(self) -> str:
        return f"{self.kind}.v{self.version}"


def _read(path: Path) -> Golden:
    match = _NAME.fullmatch(path.name)
    assert match, f"{path.name} is not <kind>.v<version>.jsonl"
    return Golden(match[1], int(match[2]), tuple(path.read_bytes().removesuffix(b"\n").split(b"\n")))


FILES = [_read(path) for path in sorted(_FOLDER.iterdir())]
