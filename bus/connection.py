"""One connection to NATS: how it reconnects, what it says of errors, and raw JetStream API calls."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import nats
import nats.errors
import structlog
from nats.aio.msg import Msg as Message
from nats.aio.subscription import Subscription

from bus import wire
from bus.client import RECONNECT_WAIT_S, Client, OnHeard
from schemas.errors import PenstockError, SetupError

log = structlog.get_logger()

SERVER_VERSION_MIN = (2, 15)
PENDING_BYTES_MAX = 32 * 1024 * 1024  # written but not sent, while the server is away
API_TIMEOUT_S = 5.0
CONNECT_WAIT_S = 30.0
SILENT_S = 2.0  # of it, before whoever watches hears what is waited for
PING_EVERY_S = 5.0  # a server that doesn't answer two of them is given up: a cut cable says nothing
PINGS_UNANSWERED_MAX = 2
SETTLE_TIMEOUT_S = 1.0

# Of an ApiError; the latter in a cluster, while another message is on its way.
WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
LISTEN_BYTES_MAX = 512 * 1024 * 1024  # of one subscription, received and not handled yet
LISTEN_MESSAGES_MAX = 1_000_000

_decode_answer = msgspec.json.Decoder(dict[str, Any]).decode

Disconnected = Callable[[], None]
Reconnected = Callable[[], Awaitable[None]]
Forget = Callable[[], None]
OnMessage = Callable[[Message], Awaitable[None]]

__all__ = [
    "WRONG_LAST_SEQUENCE",
    "ApiError",
    "BusUnavailable",
    "Connection",
    "Message",
    "MessageTooLarge",
    "api_answer",
    "connect",
]


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


class MessageTooLarge(PenstockError):
    """The message is larger than NATS takes."""

    code = "message_too_large"


class Connection:
    """A live connection; it reconnects for ever by itself. Those who hold state on the server re-make it `on_reconnect`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nc = Client()
        self._reconnected: list[Reconnected] = []
        self._disconnected: list[Disconnected] = []
        self._requests: set[asyncio.Future[Message]] = set()

    @property
    def is_up(self) -> bool:
        return bool(self.nc.is_connected)

    @property
    def max_payload(self) -> int:
        """The largest message that the server takes, its headers included, in bytes. A larger one costs the connection."""
        return int(self.nc.max_payload)

    def on_reconnect(self, callback: Reconnected) -> Forget:
        """Calls *callback* after each reconnect, until what this returns is called."""
        self._reconnected.append(callback)
        return lambda: self._reconnected.remove(callback)

    def on_disconnect(self, callback: Disconnected) -> Forget:
        """Calls *callback* when the connection is lost or closed: no answer will come to what was asked before."""
        self._disconnected.append(callback)
        return lambda: self._disconnected.remove(callback)

    async def say(self, subject: str, payload: bytes) -> None:
        """Core NATS: at most once. While the connection is away it waits in a bounded buffer.

        Raises: BusUnavailable when that buffer is full or the connection is closed.
        """
        try:
            await self.nc.publish(subject, payload)
        except nats.errors.Error as error:
            raise BusUnavailable(f"NATS took no message: {type(error).__name__}") from error

    def say_at_once(self, messages: Sequence[tuple[str, bytes]]) -> bool:
        """Says all of *messages*, subjects and payloads, in one piece. False if that can't be done now; then nothing is said.

        Core NATS: at most once.
        """
        most = self.max_payload
        if any(len(payload) > most for _, payload in messages):
            return False
        try:
            return self.nc.put(b"".join([wire.publication(subject, payload) for subject, payload in messages]))
        except ValueError:
            return False

    @property
    def is_quiet(self) -> bool:
        """Nothing was said for a moment: what is said now is on its way at once."""
        return self.nc.is_quiet

    async def listen(self, subject: str, on_message: OnMessage) -> None:
        """Hands every message on *subject* to *on_message*, in order, for the life of the connection."""
        await self.nc.subscribe(
            subject, cb=on_message, pending_msgs_limit=LISTEN_MESSAGES_MAX, pending_bytes_limit=LISTEN_BYTES_MAX
        )

    async def hear(self, subject: str, on_message: OnHeard) -> Subscription:
        """Hands every message on *subject* to *on_message* as it is read, in order, until it is unsubscribed.

        There is no queue before it, and nothing else is read meanwhile: it must be quick.
        """

        async def late(message: Message) -> None:
            on_message(message)

        subscription = await self.nc.subscribe(subject, cb=late)
        self.nc.at_once[subscription._id] = on_message  # noqa: SLF001
        return subscription

    async def settle(self, subscription: Subscription) -> None:
        """Ends *subscription*; what its server had sent before is still handed on, unless the connection is away.

        Never from the subscription's own callback: this waits for it.
        """
        try:
            if not self.is_up:
                await subscription.unsubscribe()
                return
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                await subscription.drain()  # type: ignore[no-untyped-call]
        except (nats.errors.Error, OSError) as error:  # TimeoutError is an OSError
            log.debug("unsubscribe_failed", error=type(error).__name__)
            # A drain that was cut off leaves the subscription in the client, which would renew it at each reconnect, or has already.
            subscription._stop_processing()  # noqa: SLF001
            self.nc._remove_sub(subscription._id)  # noqa: SLF001
            with suppress(nats.errors.Error, OSError):
                await self.nc._send_unsubscribe(subscription._id)  # noqa: SLF001

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
        """Raises: BusUnavailable if there is no connection, if it is lost meanwhile, or if no answer comes in time."""
        if not self.is_up:
            raise BusUnavailable
        asked: asyncio.Future[Message] = asyncio.ensure_future(
            self.nc.request(subject, payload, timeout=timeout_s, headers=headers)
        )
        self._requests.add(asked)
        try:
            await asyncio.wait((asked,))
        finally:
            self._requests.discard(asked)
            asked.cancel()
        if asked.cancelled():
            raise BusUnavailable("the connection to NATS was lost before the answer came")
        try:
            return asked.result()
        except (nats.errors.Error, OSError) as error:  # TimeoutError is an OSError
            raise BusUnavailable(
                f"NATS gave no answer on {subject.split('.', maxsplit=1)[0]}: {type(error).__name__}"
            ) from error

    async def has_listener(self, subject: str, *, within_s: float) -> bool:
        """Whether anybody listens to *subject*, who needn't answer: the server says at once that nobody does."""
        try:
            await self.nc.request(subject, b"", timeout=within_s)
        except nats.errors.NoRespondersError:
            return False
        except (nats.errors.Error, OSError):  # TimeoutError is an OSError
            return True
        return True

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
        for asked in self._requests:
            asked.cancel()
        for callback in self._disconnected:
            callback()

    async def _on_reconnected(self) -> None:
        log.info("reconnected")
        for callback in tuple(self._reconnected):
            try:
                await callback()
            except PenstockError as error:
                log.warning("reconnect_failed", callback=callback.__qualname__, error=error.message)
            except Exception:  # the others must be told all the same
                log.exception("reconnect_broke", callback=callback.__qualname__)


async def connect(
    url: str, *, name: str, wait_s: float = CONNECT_WAIT_S, ping_every_s: float = PING_EVERY_S
) -> Connection:
    """A connection to the server or cluster at *url* (several: separated by commas), whose server is new enough.

    Raises: SetupError if none can be had within *wait_s*, or the server is older than `SERVER_VERSION_MIN`.
    """
    connection = Connection(name)
    login = urlsplit(url.split(",", maxsplit=1)[0])
    telling = asyncio.get_running_loop().call_later(SILENT_S, _tell_waiting, connection, url, wait_s - SILENT_S)
    try:
        async with asyncio.timeout(wait_s):
            await connection.nc.connect(
                servers=url.split(","),
                name=name,
                # Also for servers that the cluster tells of: their addresses come without the credential.
                user=login.username if login.password else None,
                password=login.password,
                error_cb=connection._on_error,  # noqa: SLF001 - the factory is part of the class
                disconnected_cb=connection._on_disconnected,  # noqa: SLF001
                reconnected_cb=connection._on_reconnected,  # noqa: SLF001
                max_reconnect_attempts=-1,
                reconnect_time_wait=cast("int", RECONNECT_WAIT_S),
                ping_interval=cast("int", ping_every_s),
                max_outstanding_pings=PINGS_UNANSWERED_MAX,
                pending_size=PENDING_BYTES_MAX,
            )
    # TimeoutError is an OSError; uvloop raises a RuntimeError where the socket is closed while it shakes hands.
    except (nats.errors.Error, OSError, RuntimeError) as error:
        reason = _reason(connection.nc.last_error or error)
        if connection.nc.is_connecting:  # cut off while shaking hands: the socket is open
            await connection.close()
        raise SetupError(f"no NATS server could be reached at {_without_secret(url)}: {reason}") from error
    finally:
        telling.cancel()
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

    Raises: ApiError if it is a refusal, BusUnavailable if it is no answer of JetStream's.
    """
    try:
        answer = _decode_answer(data)
    except msgspec.MsgspecError as error:
        raise BusUnavailable("an answer is not JetStream's") from error
    if refusal := answer.get("error"):
        raise ApiError(
            status=refusal.get("code", 0),
            error_code=refusal.get("err_code", 0),
            description=refusal.get("description", "unknown"),
        )
    return answer


def _tell_waiting(connection: Connection, url: str, left_s: float) -> None:
    error = connection.nc.last_error
    reason = "no answer" if error is None else _reason(error)
    log.warning("nats_not_reached_yet", servers=_without_secret(url), reason=reason, given_up_in_s=left_s)


def _reason(error: Exception) -> str:
    """Why there is no connection, as far as it is known; the server's own words when it refused the credential."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error).removeprefix("nats: ") or type(error).__name__


def _without_secret(url: str) -> str:
    """*url* as it may be shown: without what stands before each server's @."""
    return ",".join(re.sub(r"^([a-z]+://)?.*@", r"\1", one) for one in url.split(","))
