"""Runs a command so that nothing of it can outlive the process that asked for it.

    Popen([sys.executable, "guard.py", COMMAND, ARG...], stdin=PIPE, start_new_session=True)

The asker holds the other end of stdin. When it dies, even by SIGKILL, the pipe closes, and the guard kills its whole
process group. vLLM needs this: without it, killing its front end leaves the engine, and its GPU memory, behind for ever.
SIGTERM and SIGINT are handed on to the command; once that has ended, what it left in the group is killed.

It imports nothing of ours, so that it starts at once and runs under any Python.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 - it is what we are for

    def hand_on(_signum: int, _frame: FrameType | None) -> None:
        child.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    threading.Thread(target=kill_group_when_asker_dies, daemon=True).start()
    status = child.wait()
    sweep_group()
    return status if status >= 0 else 128 - status


def kill_group_when_asker_dies() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.killpg(0, signal.SIGKILL)


def sweep_group() -> None:
    """Ends whatever is left of the group but this process, which still has its exit status to give."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
