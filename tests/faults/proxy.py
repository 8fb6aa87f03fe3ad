"""A cable between two programs: a TCP proxy that can be cut, frozen, slowed down and half closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

READ_MAX_BYTES = 64 * 1024
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Link:
    """One listening port on loopback; whoever connects to it speaks to *target*, another port.

    The port stays the same for life, so both ends may die and come back.
    """

    def __init__(self, name: str, target: int) -> None:
        self.name = name
        self.target = target
        self.port = 0
        self._server: asyncio.Server | None = None
        self._pairs: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}  # who dialled: the far end
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._delay_s = 0.0

    def __len__(self) -> int:
        """How many connections there are."""
        return len(self._pairs)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", 0, limit=READ_MAX_BYTES)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.heal()
        self.cut()

    def cut(self) -> None:
        """Resets every connection, on both sides."""
        for pair in list(self._pairs.items()):
            for writer in pair:
                _reset(writer)

    def freeze(self) -> None:
        """Nothing passes and nothing ends: the cable is out. New connections are taken and not answered."""
        self._flowing.clear()

    def delay(self, seconds: float) -> None:
        """What comes is handed on so much later, in order."""
        self._delay_s = seconds

    def half_close(self) -> None:
        """Those who dialled hear the end; what they say still arrives."""
        for writer in list(self._pairs):
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()

    def heal(self) -> None:
        self._delay_s = 0.0
        self._flowing.set()

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target, limit=READ_MAX_BYTES)
        except OSError:
            _reset(writer)
            return
        self._pairs[writer] = far_writer
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, far_writer))
                both.create_task(self._pump(far_reader, writer))
        except* (OSError, RuntimeError):  # RuntimeError: written behind a half close
            _reset(writer)
            _reset(far_writer)
        finally:
            del self._pairs[writer]
            writer.close()
            far_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(READ_MAX_BYTES):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        await self._flowing.wait()
        writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with a RST, as a machine that has lost its memory does."""
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    writer.transport.abort()
