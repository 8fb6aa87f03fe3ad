"""Lets this process's wall clock jump: what `time.time` and `time.time_ns` say is off by what a file says, in nanoseconds.

Python imports this by itself at its start (the folder is on PYTHONPATH), so the program under test knows nothing of it. A kernel
would need root for the same, and would move the other processes' clocks, too.
"""

import mmap
import os
import time

OFFSET_BYTES = 8


def _skew(path: str) -> None:
    with open(path, "r+b") as file:  # noqa: PTH123 - pathlib would be imported into every process
        offset = mmap.mmap(file.fileno(), OFFSET_BYTES)
    true_ns = time.time_ns

    def time_ns() -> int:
        return true_ns() + int.from_bytes(offset[:OFFSET_BYTES], "little", signed=True)

    def time_s() -> float:
        return time_ns() / 1e9

    time.time_ns, time.time = time_ns, time_s


if path := os.environ.get("FAULTS_CLOCK"):
    _skew(path)
