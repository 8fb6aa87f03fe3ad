"""HTTP to one provider: the only file that calls aiohttp, and where its errors become ours.

Source: docs/adr/0021-upstream-connections.md
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import yarl
from aiohttp.http_exceptions import ContentEncodingError

from schemas.errors import Fault, ProviderFailed, ProviderNonsense, ProviderTimeout, ProviderUnreachable
from schemas.jobs import Job
from schemas.settings import WorkerSettings
from workers.providers.patience import Patience

KEEP_ALIVE_S = 4.0  # an idle connection is dropped before uvicorn (5 s), and so vLLM, drops it under a request of ours
TRAILER_WAIT_S = 1.0  # after [DONE], for the end of the body: with it the connection can be used again
# As OpenAI calls it; vLLM's X-Request-Id would become its own, which may not come twice.
OUR_NAME = "X-Client-Request-Id"
PLAIN_BODY_BYTES_MAX = 1024 * 1024  # a longer body is written in pieces, so that it doesn't hold up the loop


class Upstream:
    """One session for all requests to *base_url*, opened with the first: it belongs to the loop that runs by then.

    No cookies, no proxy from the environment, no redirect: the key goes to the configured address and nowhere else.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        max_concurrency: int,
        settings: WorkerSettings,
        socket: Path | None = None,
    ) -> None:
        """With *socket* the server is behind that Unix socket, and *base_url* only names it."""
        self._socket = socket
        self._base_url = yarl.URL(base_url)
        self._urls: dict[str, yarl.URL] = {}
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "penstock", **headers}
        self._max_concurrency = max_concurrency
        self._connect_timeout_s = settings.connect_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._trailing: set[UpstreamAnswer] = set()
        self._closed = False

    async def ask(
        self, method: str, path: str, *, body: bytes | None = None, patience: Patience, job: Job | None = None
    ) -> UpstreamAnswer:
        """The head of the answer, its body still to come. Cancelling this closes the connection.

        If it is for a *job*, the server is told a name of ours for it, by which its own logs can be searched: it tells its own only
        with the answer.
        Raises: ProviderUnreachable, ProviderTimeout, ProviderNonsense.
        """
        data = body if body is None or len(body) <= PLAIN_BODY_BYTES_MAX else io.BytesIO(body)
        headers = None if job is None else {OUR_NAME: f"{job.request_id}.{job.epoch}"}
        try:
            async with asyncio.timeout_at(patience.until_s):
                response = await self._open().request(
                    method, self._url(path), data=data, headers=headers, allow_redirects=False
                )
        except aiohttp.ConnectionTimeoutError as error:
            raise ProviderTimeout(f"No connection to the provider within {self._connect_timeout_s:g} s.") from error
        except TimeoutError as error:
            raise patience.fault() from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise ProviderUnreachable from error
        except aiohttp.ClientError as error:
            raise ProviderNonsense("The provider's answer is not HTTP.") from error
        return UpstreamAnswer(response, self._trailing)

    async def aclose(self) -> None:
        self._closed = True
        for answer in list(self._trailing):
            answer.close()
        if self._session is not None:
            await self._session.close()

    def _url(self, path: str) -> yarl.URL:
        if path not in self._urls:
            whole = self._base_url.raw_path.rstrip("/") + path
            self._urls[path] = self._base_url.with_path(whole, encoded=True, keep_query=True)
        return self._urls[path]

    def _connector(self) -> aiohttp.BaseConnector:
        if self._socket is None:
            return aiohttp.TCPConnector(limit=self._max_concurrency, keepalive_timeout=KEEP_ALIVE_S)
        return aiohttp.UnixConnector(str(self._socket), limit=self._max_concurrency, keepalive_timeout=KEEP_ALIVE_S)

    def _open(self) -> aiohttp.ClientSession:
        if self._closed:
            raise ProviderUnreachable("This provider was closed.")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._connector(),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout_s),
                auto_decompress=True,
                trust_env=False,
            )
        return self._session


class UpstreamAnswer:
    """An answer whose body is being read. Either `close` or `let_go` ends it."""

    def __init__(self, response: aiohttp.ClientResponse, trailing: set[UpstreamAnswer]) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._trailing = trailing
        self._timer: asyncio.TimerHandle | None = None

    @property
    def content_type(self) -> str | None:
        """In lower case, without parameters; None if it isn't stated."""
        stated = self.headers.get("Content-Type")
        return None if stated is None else stated.partition(";")[0].strip().lower()

    async def read(self, patience: Patience) -> bytes:
        """What has come; waits where nothing has. Empty at the end, also where the connection broke: see `cut`.

        Raises: ProviderTimeout, ProviderNonsense.
        """
        content = self._response.content
        try:
            if data := content.read_nowait():
                return data
            async with asyncio.timeout_at(patience.until_s):
                return await content.readany()
        except TimeoutError as error:
            raise patience.fault() from error
        except aiohttp.ClientPayloadError as error:
            if isinstance(error.__cause__, ContentEncodingError):
                raise ProviderNonsense("The provider's answer can't be decompressed.") from error
            return b""
        except (aiohttp.ClientError, OSError):
            return b""

    @property
    def cut(self) -> bool:
        """The connection broke before the body's end."""
        content = self._response.content
        return content.exception() is not None or not content.is_eof()

    async def read_all(self, max_bytes: int, patience: Patience) -> bytes:
        """The whole body.

        Raises: as `read`; ProviderNonsense if it is over *max_bytes*, ProviderFailed if it was cut off.
        """
        pieces, size = [], 0
        while data := await self.read(patience):
            patience.renew()
            pieces.append(data)
            size += len(data)
            if size > max_bytes:
                raise ProviderNonsense(f"The provider sent an answer of more than {max_bytes} bytes.")
        if self.cut:
            raise ProviderFailed("The provider's answer ended early.")
        return b"".join(pieces)

    async def read_some(self, max_bytes: int, patience: Patience) -> bytes:
        """As much of a body that explains an error as there is, up to *max_bytes*."""
        pieces, size = [], 0
        try:
            while size < max_bytes and (data := await self.read(patience)):
                pieces.append(data)
                size += len(data)
        except Fault:
            pass
        return b"".join(pieces)[:max_bytes]

    def close(self) -> None:
        """Ends the work: the connection is closed now, unless the body has been read to its end."""
        if self._timer is not None:
            self._timer.cancel()
            self._trailing.discard(self)
        self._response.close()

    def let_go(self) -> None:
        """All is said, though perhaps not the HTTP body's end: that is waited for out of the way, but not for ever."""
        if self._response.closed:
            return
        self._trailing.add(self)
        self._timer = asyncio.get_running_loop().call_later(TRAILER_WAIT_S, self.close)
        self._response.content.on_eof(self.close)
