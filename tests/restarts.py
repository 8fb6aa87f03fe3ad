"""What happens to a NATS server: it is killed, it comes back, it freezes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from bus.connection import Connection
from bus.server import EmbeddedServer
from tests.waiting import eventually


async def kill(server: EmbeddedServer) -> None:
    """kill -9; returns when it is dead."""
    os.kill(server.pid, signal.SIGKILL)
    await eventually(lambda: server.exit_code() is not None, what="the server's death")


async def restart(server: EmbeddedServer, *connections: Connection) -> None:
    """kill -9, and back on the same port with the same store; returns when *connections* are back, too, and heard there.

    What was in the server's memory is lost.
    """
    before = [connection.nc.stats["reconnects"] for connection in connections]
    await kill(server)
    await server.start()
    for connection, reconnects in zip(connections, before, strict=True):
        await eventually(
            lambda c=connection, r=reconnects: c.is_up and c.nc.stats["reconnects"] > r, what="the reconnect"
        )
        await connection.nc.flush()  # behind what it listens to: what another says from now on reaches it


async def cut(connection: Connection) -> None:
    """The TCP connection breaks, the server stays. Returns when *connection* is back."""
    reconnects = connection.nc.stats["reconnects"]
    connection.nc._transport._io_writer.transport.abort()
    await eventually(lambda: connection.is_up and connection.nc.stats["reconnects"] > reconnects, every_s=0)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process is there, but does nothing: to its clients a cut cable."""
    os.kill(pid, signal.SIGSTOP)
    try:
        while not is_stopped(pid):
            time.sleep(0.001)
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


def is_stopped(pid: int) -> bool:
    """Whether each of its threads has stopped."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}
