"""One connection to NATS: how it reconnects, what it says of errors, and raw JetStream API calls."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import nats
import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg as Message

from schemas.errors import PenstockError, SetupError

log = structlog.get_logger()

SERVER_VERSION_MIN = (2, 15)
RECONNECT_WAIT_S = 0.2
PENDING_BYTES_MAX = 32 * 1024 * 1024  # written but not sent, while the server is away
API_TIMEOUT_S = 5.0
CONNECT_WAIT_S = 30.0

LISTEN_BYTES_MAX = 512 * 1024 * 1024  # of one subscription, received and not handled yet
LISTEN_MESSAGES_MAX = 1_000_000

Reconnected = Callable[[], Awaitable[None]]
OnMessage = Callable[[Message], Awaitable[None]]

__all__ = ["ApiError", "BusUnavailable", "Connection", "Message", "api_answer", "connect"]


class ApiError(PenstockError):
    """JetStream refused a call."""

    code = "jetstream_error"

    def __init__(self, *, status: int, error_code: int, description: str) -> None:
        super().__init__(f"JetStream: {description} ({error_code})")
        self.status = status
        self.error_code = error_code


class BusUnavailable(PenstockError):
    """NATS can't be reached."""

    code = "bus_unavailable"


class Connection:
    """A live connection; it reconnects for ever by itself. Those who hold state on the server re-make it `on_reconnect`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nc = Client()
        self._reconnected: list[Reconnected] = []

    @property
    def is_up(self) -> bool:
        return bool(self.nc.is_connected)

    def on_reconnect(self, callback: Reconnected) -> None:
        self._reconnected.append(callback)

    async def say(self, subject: str, payload: bytes) -> None:
        """Core NATS: at most once. While the connection is away it waits in a bounded buffer.

        Raises: BusUnavailable when that buffer is full or the connection is closed.
        """
        try:
            await self.nc.publish(subject, payload)
        except nats.errors.Error as error:
            raise BusUnavailable(f"NATS took no message: {type(error).__name__}") from error

    async def listen(self, subject: str, on_message: OnMessage) -> None:
        """Hands every message on *subject* to *on_message*, in order, for the life of the connection."""
        await self.nc.subscribe(
            subject, cb=on_message, pending_msgs_limit=LISTEN_MESSAGES_MAX, pending_bytes_limit=LISTEN_BYTES_MAX
        )

    async def api(self, verb: str, body: object = None, *, timeout_s: float = API_TIMEOUT_S) -> dict[str, Any]:
        """Calls ``$JS.API.<verb>`` and returns its answer.

        Raises: ApiError if JetStream refuses, BusUnavailable if nobody answers in time.
        """
        payload = b"" if body is None else msgspec.json.encode(body)
        answer = await self.request(f"$JS.API.{verb}", payload, timeout_s=timeout_s)
        return api_answer(answer.data)

    async def request(
        self, subject: str, payload: bytes, *, timeout_s: float, headers: dict[str, str] | None = None
    ) -> Message:
        """Raises: BusUnavailable if there is no connection or no answer in time."""
        try:
            return await self.nc.request(subject, payload, timeout=timeout_s, headers=headers)
        except (TimeoutError, nats.errors.Error, OSError) as error:
            raise BusUnavailable(
                f"NATS gave no answer on {subject.split('.', maxsplit=1)[0]}: {type(error).__name__}"
            ) from error

    async def close(self) -> None:
        """Sends what is written, then closes. Never raises: there is nothing left to be done about it."""
        try:
            async with asyncio.timeout(2.0):
                if self.nc.is_connected:
                    await self.nc.flush(1)
                await self.nc.close()
        except (
            nats.errors.Error,
            OSError,
            TimeoutError,
            RuntimeError,
        ) as error:  # RuntimeError: uvloop, closed already
            log.debug("close_failed", error=type(error).__name__)

    async def _on_error(self, error: Exception) -> None:
        match error:
            case nats.errors.SlowConsumerError():
                log.warning("slow_consumer", subject=error.subject)
            case OSError() | nats.errors.StaleConnectionError() | nats.errors.UnexpectedEOF():
                log.debug("connection_error", error=type(error).__name__)
            case _:
                log.warning("connection_error", error=type(error).__name__)

    async def _on_disconnected(self) -> None:
        if not self.nc.is_closed:
            log.info("disconnected")

    async def _on_reconnected(self) -> None:
        log.info("reconnected")
        for callback in self._reconnected:
            try:
                await callback()
            except PenstockError as error:
                log.warning("reconnect_failed", callback=callback.__qualname__, error=error.message)


async def connect(url: str, *, name: str, wait_s: float = CONNECT_WAIT_S) -> Connection:
    """A connection to the server or cluster at *url* (several: separated by commas), whose server is new enough.

    Raises: SetupError if none can be had within *wait_s*, or the server is older than `SERVER_VERSION_MIN`.
    """
    connection = Connection(name)
    try:
        async with asyncio.timeout(wait_s):
            await connection.nc.connect(
                servers=url.split(","),
                name=name,
                error_cb=connection._on_error,  # noqa: SLF001 - the factory is part of the class
                disconnected_cb=connection._on_disconnected,  # noqa: SLF001
                reconnected_cb=connection._on_reconnected,  # noqa: SLF001
                max_reconnect_attempts=-1,
                reconnect_time_wait=cast("int", RECONNECT_WAIT_S),
                pending_size=PENDING_BYTES_MAX,
            )
    except (nats.errors.Error, OSError, TimeoutError) as error:
        raise SetupError(
            f"no NATS server could be reached at {_without_secret(url)}: {type(error).__name__}"
        ) from error
    version = connection.nc.connected_server_version
    if (version.major, version.minor) < SERVER_VERSION_MIN:
        await connection.close()
        wanted = ".".join(map(str, SERVER_VERSION_MIN))
        raise SetupError(
            f"the NATS server at {_without_secret(url)} is {version.major}.{version.minor}.{version.patch}; "
            f"{wanted} or newer is needed (earlier ones could lose acknowledged events)"
        )
    return connection


def api_answer(data: bytes) -> dict[str, Any]:
    """The body of a JetStream answer.

    Raises: ApiError if it is a refusal.
    """
    answer = cast("dict[str, Any]", msgspec.json.decode(data))
    if refusal := answer.get("error"):
        raise ApiError(
            status=refusal.get("code", 0),
            error_code=refusal.get("err_code", 0),
            description=refusal.get("description", "unknown"),
        )
    return answer


def _without_secret(url: str) -> str:
    """*url* as it may be shown: without what stands before the @."""
    return re.sub(r"(?<=://)[^/,]*@", "", url)
