"""Time, without what the machine had to do for others: so that a bound on it holds on a busy machine, and still is one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
STOLEN = 8  # of the numbers of /proc/stat: what the machine's own host gave to others


class Stopwatch:
    """Runs from when it is made.

    Linux counts for each thread how long it was ready to run and had no processor. What the threads of this process and of
    those that it started waited so is no time of theirs. On an idle machine that is nothing, elsewhere it is unknown.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._waited = _waited_by_thread()
        self._stolen_s = _stolen_s()

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def waited_s(self) -> float:
        """For a processor, all threads together."""
        now = _waited_by_thread()
        waited_ns = sum(ns - self._waited.get(thread, 0) for thread, ns in now.items())
        return waited_ns / 1e9 + _stolen_s() - self._stolen_s

    @property
    def s(self) -> float:
        """What an idle machine would have taken, or less: threads wait at the same time, too."""
        wall_s = self.wall_s
        return wall_s - self.waited_s


def _waited_by_thread() -> dict[str, int]:
    """Nanoseconds, of this process and all below it."""
    waited: dict[str, int] = {}
    for pid in _family(os.getpid()):
        for folder in _threads(pid):
            with suppress(OSError):  # it has ended meanwhile
                waited[folder.name] = int((folder / "schedstat").read_text().split()[1])
    return waited


def _family(pid: int) -> Iterator[int]:
    yield pid
    for folder in _threads(pid):
        with suppress(OSError):
            for child in (folder / "children").read_text().split():
                yield from _family(int(child))


def _threads(pid: int) -> list[Path]:
    return list((PROC / str(pid) / "task").glob("[0-9]*"))


def _stolen_s() -> float:
    with suppress(OSError, IndexError):
        return int((PROC / "stat").read_text().split(maxsplit=STOLEN + 1)[STOLEN]) * TICK_S
    return 0.0
