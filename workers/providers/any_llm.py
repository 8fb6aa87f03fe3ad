"""Anthropic's and Google's own wires, spoken by any-llm and the libraries of those two: the extra ``wires``.

This is the only file that imports them. Requests go through an HTTP client of our own, without retries, redirects and proxies: those
are not the library's to decide.
Source: docs/adr/0045-own-wires.md
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import anthropic
import httpx
from any_llm import AnyLLM
from any_llm.exceptions import AnyLLMError, InvalidRequestError, UnsupportedParameterError
from google.genai import errors as google_errors
from google.genai.types import HttpOptions

from schemas.errors import (
    Fault,
    ProviderFailed,
    ProviderNonsense,
    ProviderRejected,
    ProviderTimeout,
    ProviderUnreachable,
)
from schemas.jobs import Continues, Job, ModelFingerprint
from schemas.providers import KnownProvider
from schemas.routes import completed
from schemas.settings import RouteSettings, WorkerSettings
from workers.providers.any_llm_bodies import Answers, honoured, question
from workers.providers.base import Chunk, Heard, Provider, Tell
from workers.providers.openai import address, first_key
from workers.providers.openai_chunks import ChunkReader
from workers.providers.openai_faults import complaint_of, refusal, refusal_inside, retry_after_s
from workers.providers.patience import Patience
from workers.providers.upstream import KEEP_ALIVE_S

MODELS_TIMEOUT_S = 10.0
MODELS_MAX = 1000
GEMINI_VERSION = "v1beta"  # the library's own choice is v1, which hasn't all models

T = TypeVar("T")

# The answers that the work being waited for has opened: Google's library leaves one open whose stream is closed between two pieces.
_opened: ContextVar[list[httpx.Response]] = ContextVar("opened")


class OwnWire(Provider):
    def __init__(
        self, known: KnownProvider, route: RouteSettings, *, key: str | None, settings: WorkerSettings
    ) -> None:
        self.name = route.provider
        self._wire = known.wire
        self._route = route
        self._address = address(route)
        self._key = key or "none"  # the libraries would look for one of their own
        self._settings = settings
        self._upstream_names = {model.name: model.upstream_name for model in route.models}
        self._http: httpx.AsyncClient | None = None
        self._library: AnyLLM | None = None
        self._heard: Heard = lambda _: None
        self._closed = False

    @classmethod
    def of(cls, known: KnownProvider, route: RouteSettings, settings: WorkerSettings) -> OwnWire:
        """Raises: SetupError if the route can't work as it is written."""
        route = completed(route, os.environ)
        return cls(known, route, key=first_key(route), settings=settings)

    def upstream_model(self, model: str) -> str:
        return self._upstream_names.get(model, model)

    def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """Closing the generator, or cancelling its task, closes the connection.

        Raises: a subclass of Fault.
        """
        return self._stream(job) if job.stream else self._whole(job)

    async def models(self) -> tuple[str, ...]:
        clock = asyncio.get_running_loop().time
        patience = Patience(first_s=MODELS_TIMEOUT_S, idle_s=MODELS_TIMEOUT_S, total_s=MODELS_TIMEOUT_S, clock=clock)
        most: dict[str, Any] = (
            {"limit": MODELS_MAX} if self._wire == "anthropic" else {"config": {"page_size": MODELS_MAX}}
        )
        listed = await _within(self._open().alist_models(**most), patience, opened=[])
        return tuple(dict.fromkeys(model.id for model in listed))

    def continues(self, model: str) -> Continues:  # noqa: ARG002
        return Continues.NO

    def fingerprint(self, model: str) -> ModelFingerprint | None:  # noqa: ARG002
        return None

    def parameters(self) -> tuple[str, ...]:
        return honoured(self._wire)

    def attach(self, tell: Tell) -> None:
        pass

    def listen(self, heard: Heard) -> None:
        self._heard = heard

    async def aclose(self) -> None:
        self._closed = True
        if self._http is not None:
            await self._http.aclose()

    async def _stream(self, job: Job) -> AsyncGenerator[Chunk, None]:
        asked, patience = question(job, self._wire), self._patience(job)
        answers, reader = Answers(), ChunkReader()
        opened: list[httpx.Response] = []
        pieces: Any = None
        try:
            pieces = await _within(self._ask(job, asked), patience, opened=opened)
            while (piece := await _within(anext(pieces, None), patience, opened=opened)) is not None:
                told = answers.piece(piece.model_dump(mode="json", exclude_none=True))
                chunk = None if told is None else reader.event(b"", told)
                if chunk is not None:
                    yield chunk
                    patience.renew()
            reader.check_complete()
        finally:
            if pieces is not None:
                await pieces.aclose()
            for response in opened:
                await response.aclose()

    async def _whole(self, job: Job) -> AsyncGenerator[Chunk, None]:
        asked, patience = question(job, self._wire), self._patience(job)
        answer = await _within(self._ask(job, asked), patience, opened=[])
        yield ChunkReader().body(Answers().whole(answer.model_dump(mode="json", exclude_none=True)))

    def _ask(self, job: Job, asked: dict[str, Any]) -> Awaitable[Any]:
        return self._open().acompletion(self.upstream_model(job.model), **asked)

    def _patience(self, job: Job) -> Patience:
        return Patience.with_job(job.timeouts, self._settings, clock=asyncio.get_running_loop().time)

    def _open(self) -> AnyLLM:
        """The library's client, made with the first request: it belongs to the loop that runs by then."""
        if self._closed:
            raise ProviderUnreachable("This provider was closed.")
        if self._library is None:
            self._http = _http_client(self._route, self._settings, self._heard)
            options: dict[str, Any] = (
                {"http_client": self._http}
                if self._wire == "anthropic"
                else {"http_options": HttpOptions(httpx_async_client=self._http, api_version=GEMINI_VERSION)}
            )
            self._library = AnyLLM.create(
                self._wire,
                api_key=self._key,
                api_base=self._address,
                unified_exceptions=True,
                max_retries=0,
                **options,
            )
        return self._library


def fault_of(error: AnyLLMError) -> Fault:
    """What *error* is here: by the type and the status of what the library beneath raised, never by its text."""
    fault: Fault
    match error.original_exception:
        case anthropic.APIStatusError() as cause:
            fault = _refusal(cause.status_code, cause.body, cause.response.headers)
        case google_errors.APIError() as cause:
            fault = _refusal(cause.code, cause.details, getattr(cause.response, "headers", {}))
        case anthropic.APITimeoutError() | httpx.TimeoutException():
            fault = ProviderTimeout()
        case anthropic.APIConnectionError() | httpx.ConnectError():
            fault = ProviderUnreachable()
        case httpx.TransportError():
            fault = ProviderFailed("The provider's answer ended early.")
        case None if isinstance(
            error, InvalidRequestError | UnsupportedParameterError
        ):  # it can't say this on this wire
            fault = ProviderRejected(error.message, status=400, type_="invalid_request_error", param=error.param)
        case _:
            fault = ProviderNonsense()
    return fault


def _refusal(status: int, body: object, headers: Mapping[str, str]) -> Fault:
    said = complaint_of(body)
    if 200 <= status < 300:  # in the middle of a stream
        return refusal_inside(said)
    return refusal(status, said, retry_after_s=retry_after_s(headers))


async def _within(work: Awaitable[T], patience: Patience, *, opened: list[httpx.Response]) -> T:
    """The result of *work*; the answers that it opens are put into *opened*.

    Raises: Fault, also when it takes longer than *patience* has.
    """
    token = _opened.set(opened)
    try:
        async with asyncio.timeout_at(patience.until_s):
            return await work
    except TimeoutError as error:
        raise patience.fault() from error
    except AnyLLMError as error:
        raise fault_of(error) from error
    finally:
        _opened.reset(token)


def _http_client(route: RouteSettings, settings: WorkerSettings, heard: Heard) -> httpx.AsyncClient:
    async def note(response: httpx.Response) -> None:
        _opened.get().append(response)
        heard(response.headers)

    most = route.slots
    return httpx.AsyncClient(
        headers={"Accept-Encoding": "identity", "User-Agent": "penstock", **route.headers},
        limits=httpx.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=KEEP_ALIVE_S),
        timeout=httpx.Timeout(None, connect=settings.connect_timeout_s),
        event_hooks={"response": [note]},
        follow_redirects=False,
        trust_env=False,
    )
