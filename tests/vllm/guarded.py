"""A program under the guard: started with its log in a file, awaited until ready, never left behind."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUARD = ROOT / "workers" / "engine" / "guard.py"  # the one that workers put before their engines
LOG_TAIL_CHARS = 6000
POLL_S = 0.05


class GuardedProcess:
    """*pid* is the guard's, which leads the program's process group. *log_path* has the program's stdout and stderr."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self._process = process
        self.log_path = log_path

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Return once *ready*; what it raises for want of an answer counts as not yet.

        Raises: RuntimeError with the end of the log if the program ends first or *timeout_s* is over.
        """
        until = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError, ValueError):
                if ready():
                    return
            if self._process.poll() is not None:
                raise RuntimeError(f"ended with status {self._process.returncode}\n{self.log_tail()}")
            if time.monotonic() > until:
                raise RuntimeError(f"not ready within {timeout_s} s\n{self.log_tail()}")
            time.sleep(POLL_S)

    def stop(self, *, within_s: float) -> int:
        """Ask it to end; after *within_s* its whole group is killed. Gives its exit status."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        assert self._process.stdin is not None
        self._process.stdin.close()  # the guard kills the group now, if it is still there
        return self._process.wait()

    def log_tail(self) -> str:
        return self.log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:]


@contextlib.contextmanager
def guarded(
    command: Sequence[str], *, env: Mapping[str, str], log_path: Path, stop_within_s: float
) -> Iterator[GuardedProcess]:
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(GUARD), *command],
            cwd=ROOT,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    program = GuardedProcess(process, log_path)
    try:
        yield program
    finally:
        program.stop(within_s=stop_within_s)
