"""An engine's output on disk, bounded."""

from __future__ import annotations

import contextlib
from pathlib import Path

LOG_MAX_BYTES = 8 * 1024 * 1024
TAIL_MAX_BYTES = 64 * 1024  # what names the cause of an end may be far from its last line
TAIL_LINES = 20


class LogFile:
    """A file of at most *max_bytes*; the one before it is kept as ``….old``, and no more."""

    def __init__(self, path: Path, *, max_bytes: int = LOG_MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._size: int | None = None  # not known before the first write: the file may be there already
        self._last = b""

    def begin(self) -> None:
        """Another life of the engine: what the one before said doesn't explain this one's end."""
        self._last = b""

    def recent(self) -> str:
        return self._last.decode(errors="replace")

    def write(self, data: bytes) -> None:
        self._last = (self._last + data)[-TAIL_MAX_BYTES:]
        with contextlib.suppress(OSError):  # a full disk costs us the log and not the engine
            self._append(data[-self._max_bytes :])

    def tail(self) -> list[str]:
        return self.recent().splitlines()[-TAIL_LINES:]

    def _append(self, data: bytes) -> None:
        if self._size is None:
            self._size = self.path.stat().st_size if self.path.exists() else 0
        if self._size + len(data) > self._max_bytes:
            self.path.replace(self.path.with_suffix(".old"))
            self._size = 0
        with self.path.open("ab") as file:
            file.write(data)
        self._size += len(data)
