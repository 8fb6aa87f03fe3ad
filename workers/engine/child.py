"""One process under the guard: started, heard, and ended with all that it started itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

GUARD = Path(__file__).with_name("guard.py")
STOP_WAIT_S = 15.0
LAST_WORDS_WAIT_S = 1.0  # for the end of the output, once all processes have ended

Heard = Callable[[bytes], None]


class Child(asyncio.SubprocessProtocol):
    """*exited* is set when the guard has ended; what it left may still write.

    That is why this is a protocol: a `Process.wait` of asyncio's may wait for the output's end, too.
    """

    def __init__(self, heard: Heard) -> None:
        self.exited = asyncio.Event()
        self._silent = asyncio.Event()
        self._heard = heard
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def start(cls, argv: tuple[str, ...], environ: Mapping[str, str], heard: Heard) -> Child:
        """Raises: OSError."""
        _, child = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(heard),
            sys.executable,
            str(GUARD),
            *argv,
            env={**os.environ, **environ},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        return child

    @property
    def pid(self) -> int:
        """The guard's; it leads the process group."""
        assert self._transport is not None  # noqa: S101 - it is there from the start
        return self._transport.get_pid()

    async def stop(self, *, wait_s: float = STOP_WAIT_S) -> None:
        """SIGTERM first. What doesn't go in time is killed, and so is what the guard left behind, or its own end did."""
        if not self.exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.exited.wait()
        self.kill()
        await self.exited.wait()

    def kill(self) -> None:
        """All of it, now: for one that is dead at heart and would only take its time."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    async def aclose(self, *, wait_s: float = STOP_WAIT_S) -> None:
        """Stops it, hears the rest of its output, and gives the pipes back."""
        await self.stop(wait_s=wait_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_WAIT_S):
                await self._silent.wait()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)  # uvloop's is one, but not by inheritance

    def pipe_data_received(self, fd: int, data: bytes) -> None:  # noqa: ARG002 - there is one
        self._heard(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002
        if fd == 1:
            self._silent.set()

    def process_exited(self) -> None:
        self.exited.set()
