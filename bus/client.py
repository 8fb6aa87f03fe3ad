"""nats-py, but for what would cost the connection, and for what is hot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import nats.errors
import structlog
from nats.aio.client import DEFAULT_FLUSH_TIMEOUT, PING_PROTO
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg as Message
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

from bus import wire

log = structlog.get_logger()

RECONNECT_WAIT_S = 0.2
LULL_S = 0.005  # nothing was published for so long: what is now goes out at once. Shorter, and a busy process writes too often
KEEPS_CONNECTION = ("permissions violation", "stale connection")  # what nats-py handles as it should
NO_STATUS = b"NATS/1.0\r\n"  # how headers begin that are a publisher's: they are the stream's to read

OnHeard = Callable[[Message], None]
T = TypeVar("T")


class Client(NatsClient):
    """What differs from nats-py.

    It closes for good when its server says ``-ERR``, whatever it says, and is deaf from then on when its reader breaks, as it
    does over the answer to a flush that nobody waits for any more; this one reconnects, and expects that answer. It
    writes a PING ahead of what waits to be written, so that a flush says nothing of that; this one writes it behind. It
    gives reconnecting up for good over an error that it doesn't expect: this one goes on. It lets an error of its transport out
    to whoever happens to publish: for this one the connection is lost. It keeps a cancellation to itself where it flushes, and
    the task that was to end goes on: this one ends.

    It reads through a stream, a task, three regular expressions, a queue and another task. This one hands messages of the
    subscriptions `at_once` on as they come from the socket, where nothing before them waits for nats-py, and of headers it
    looks only for a status. It writes through a queue and a task; this one writes in the loop's next turn what was published in this
    one, and after a lull in this turn already.
    Source: docs/adr/0016-hot-path-to-nats.md
    """

    def __init__(self) -> None:
        super().__init__()
        self.at_once: dict[int, OnHeard] = {}  # by subscription
        self._parser = self._ps = _Parser(self)
        self._published_at = 0.0  # monotonic seconds
        self._writing: asyncio.Handle | None = None  # of what waits in this turn of the loop
        self._noticing: asyncio.Task[Any] | None = None  # that the connection is lost

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        try:
            message = wire.publication(subject, payload, reply=reply, headers=headers)
        except ValueError:
            message = b""
        if not message or len(payload) > self._max_payload or not self.put(message):
            await super().publish(subject, payload, reply, headers)  # which says why, or waits for room

    @property
    def is_quiet(self) -> bool:
        """Nothing was published for a moment."""
        return time.monotonic() - self._published_at > LULL_S

    def put(self, messages: bytes) -> bool:
        """Takes *messages* as they are on the wire, none of which is too large. False if they can't be written, nor wait to be."""
        size = self._pending_data_size + len(messages)
        if not self.is_connected or self.is_draining_pubs or size > self._max_pending_size:
            return False
        quiet, self._published_at = self.is_quiet, time.monotonic()
        self._pending.append(messages)
        self._pending_data_size = size
        if quiet:
            self._write_pending()
        elif self._writing is None:
            self._writing = asyncio.get_running_loop().call_soon(self._write_pending)
        return True

    def _write_pending(self) -> None:
        """Writes what waits; nats-py's own task does, and waits for room, where the server doesn't read as fast as we write."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        flusher, queue = self._flusher_task, self._flush_queue
        if not self._pending or not self.is_connected or flusher is None or queue is None:
            return  # it is written when there is a connection again
        if flusher.done():
            self._noticing = asyncio.create_task(self._flush_pending())
        elif queue.empty() and (transport := self._free_transport()) is not None:
            messages, self._pending, self._pending_data_size = self._pending, [], 0
            transport.write(messages[0] if len(messages) == 1 else b"".join(messages))
        elif queue.empty():
            queue.put_nowait(asyncio.get_running_loop().create_future())

    def _free_transport(self) -> asyncio.WriteTransport | None:
        """What writes, if nothing waits in it. None for a WebSocket, too."""
        writer = getattr(self._transport, "_io_writer", None)
        if not isinstance(writer, asyncio.StreamWriter):
            return None
        transport = writer.transport
        return None if transport.is_closing() or transport.get_write_buffer_size() else transport

    async def _read_loop(self) -> None:
        reader = getattr(self._transport, "_io_reader", None)  # of TCP; a WebSocket has none
        if isinstance(reader, asyncio.StreamReader):
            self._tap(reader)
        await super()._read_loop()
        if self.is_connected:
            await self._process_op_err(nats.errors.UnexpectedEOF())

    def _tap(self, reader: asyncio.StreamReader) -> None:
        """What comes from the socket is looked at before *reader* gets it, and it gets what is not for `at_once`."""
        feed = reader.feed_data

        def look(data: bytes) -> None:
            if self._parser.idle and not reader._buffer and self.is_connected:  # type: ignore[attr-defined]  # noqa: SLF001
                data = data[self._hand_on(data) :]
            if data:
                feed(data)

        reader.feed_data = look  # type: ignore[method-assign, assignment]

    def _hand_on(self, data: bytes) -> int:
        """Hands on the messages that *data* begins with, as far as they are all there; returns where they end."""
        at = 0
        while (message := wire.read(data, at)) is not None:
            on_message = self.at_once.get(message.sid)
            if on_message is None or (message.headers and not message.headers.startswith(NO_STATUS)):
                break
            at = message.end
            _hand(on_message, self._build_message(message.sid, message.subject, message.reply, message.payload, None))
        return at

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        on_message = self.at_once.get(sid)
        if on_message is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            _hand(on_message, self._build_message(sid, subject, reply, data, await self._process_headers(headers)))

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self.at_once.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        return None if headers is None or headers.startswith(NO_STATUS) else await super()._process_headers(headers)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """The transport of uvloop raises a RuntimeError where it was closed under us, which nobody who publishes expects."""
        try:
            return await _ended_with(super()._flush_pending(force_flush))
        except RuntimeError as error:
            log.debug("connection_error", error=type(error).__name__)
            await self._process_op_err(nats.errors.UnexpectedEOF())

    async def _attempt_reconnect(self) -> None:
        """For one, uvloop's transport raises a RuntimeError where it was closed between the server's greeting and ours."""
        while not self.is_closed:
            try:
                return await super()._attempt_reconnect()
            except Exception as error:  # noqa: BLE001 - whatever it is, a client that has stopped trying is deaf for ever
                await self._error_cb(error)
                await asyncio.sleep(RECONNECT_WAIT_S)
        return None

    async def flush(self, timeout: int = DEFAULT_FLUSH_TIMEOUT) -> None:  # noqa: ASYNC109 - nats-py's
        await _ended_with(super().flush(timeout))

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        if not self.is_connected:
            await super()._send_ping(future)
            return
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_err(self, err_msg: str) -> None:
        if any(word in err_msg for word in KEEPS_CONNECTION):
            await super()._process_err(err_msg)
        else:
            error = nats.errors.Error(f"nats: {err_msg}")
            await self._error_cb(error)
            await self._process_op_err(error)


async def _ended_with(waiting: Awaitable[T]) -> T:
    """What *waiting* gives; a cancellation that ended it, and that it kept to itself, is raised.

    nats-py does so in one place; `asyncio.wait_for` does it before Python 3.12, where what it waits for comes in the same turn.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    given = await waiting
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return given


def _hand(on_message: OnHeard, message: Message) -> None:
    try:
        on_message(message)
    except Exception:  # it must not cost the connection, and with it all that comes behind
        log.exception("listener_broke")


class _Parser(Parser):
    """Knows whether nats-py is in the middle of something."""

    busy = False

    @property
    def idle(self) -> bool:
        return not (self.busy or self.buf) and self.state == AWAITING_CONTROL_LINE

    async def parse(self, data: bytes = b"") -> None:
        self.busy = True
        try:
            await super().parse(data)
        finally:
            self.busy = False
