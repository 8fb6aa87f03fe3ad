"""What happens to a NATS server: it is killed, it comes back, it freezes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from bus.server import EmbeddedServer
from tests.waiting import eventually


async def kill(server: EmbeddedServer) -> None:
    """kill -9; returns when it is dead."""
    os.kill(server.pid, signal.SIGKILL)
    await eventually(lambda: server.exit_code() is not None, what="the server's death")


async def restart(server: EmbeddedServer) -> None:
    """kill -9, and back on the same port with the same store. What was in memory is lost."""
    await kill(server)
    await server.start()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process is there, but does nothing: to its clients a cut cable."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_gone(pid: int) -> bool:
    """Whether the process has ended; one that its new parent hasn't buried yet has."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
