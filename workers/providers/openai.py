"""Any server that speaks OpenAI's chat completions: OpenAI itself, vLLM, Ollama, another gateway.

The request goes out as the client wrote it, but for the model's name and a usage report at the end of a stream; the answer
comes back as the provider wrote it. upstream.py speaks HTTP, openai_chunks.py reads answers, openai_faults.py errors.
Source: docs/adr/0020-pass-through.md, docs/adr/0022-upstream-faults.md
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

import msgspec
import yarl
from msgspec import Raw, Struct

from schemas.errors import ProviderNonsense, ProviderRejected, SetupError
from schemas.jobs import Continues, Job, ModelFingerprint
from schemas.settings import ModelSettings, RouteSettings, WorkerSettings, secret
from workers.providers.base import Chunk, Heard, Provider, Tell
from workers.providers.openai_chunks import ChunkReader
from workers.providers.openai_faults import complaint, refusal, refusal_inside, retry_after_s
from workers.providers.patience import Patience
from workers.providers.sse import EventSplitter
from workers.providers.turns import Turns
from workers.providers.upstream import Upstream, UpstreamAnswer

OPENAI_URL = "https://api.openai.com/v1"
ERROR_BODY_BYTES_MAX = 64 * 1024
MODELS_TIMEOUT_S = 10.0
MODELS_BYTES_MAX = 8 * 1024 * 1024

STREAM, _JSON = "text/event-stream", "application/json"
UNTYPED = (
    None,
    "text/plain",
    "application/octet-stream",
    "application/x-ndjson",
)  # says nothing: what is in it will show
_USAGE_WANTED = Raw(b'{"include_usage":true}')
_TRUE, _FALSE = Raw(b"true"), Raw(b"false")
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


_members = msgspec.json.Decoder(dict[str, Raw]).decode
_models = msgspec.json.Decoder(_Models).decode
_encode = msgspec.json.encode


class OpenAI(Provider):
    name = "openai"

    def __init__(
        self,
        base_url: str,
        models: tuple[ModelSettings, ...] = (),
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        max_concurrency: int = 64,
        settings: WorkerSettings | None = None,
        socket: Path | None = None,
    ) -> None:
        """With *socket* the server is behind that Unix socket, and *base_url* only names it."""
        self._settings = settings or WorkerSettings()
        self._upstream_names = {model.name: model.upstream_name for model in models}
        self._heard: Heard = lambda _: None
        self._turns = Turns()
        sent = {"Content-Type": "application/json", **(headers or {})}
        if key is not None:
            sent |= self._key_headers(key)
        self._upstream = Upstream(
            base_url, sent, max_concurrency=max_concurrency, settings=self._settings, socket=socket
        )

    @classmethod
    def from_route(cls, route: RouteSettings, settings: WorkerSettings) -> OpenAI:
        """Raises: SetupError if the address isn't one, or none of the keys can be read."""
        base_url = address(route)
        key = first_key(route)
        return cls(
            base_url,
            route.models,
            key=key,
            headers=route.headers,
            max_concurrency=route.slots,
            settings=settings,
        )

    def upstream_model(self, model: str) -> str:
        return self._upstream_names.get(model, model)

    def generate(self, job: Job) -> AsyncGenerator[Chunk, None]:
        """Closing the generator, or cancelling its task, closes the connection, so that the engine stops too.

        Raises: a subclass of Fault.
        """
        return self._stream(job) if job.stream else self._whole(job)

    async def fetch(
        self, method: str, path: str, *, body: bytes | None = None, within_s: float, max_bytes: int
    ) -> bytes:
        """The JSON body of a request that is ours, not a job's. Raises: Fault."""
        clock = asyncio.get_running_loop().time
        patience = Patience(first_s=within_s, idle_s=within_s, total_s=within_s, clock=clock)
        answer = await self._upstream.ask(method, path, body=body, patience=patience)
        try:
            await must_be(_JSON, answer, patience)
            return await answer.read_all(max_bytes, patience)
        finally:
            answer.close()

    async def models(self) -> tuple[str, ...]:
        body = await self.fetch("GET", "/models", within_s=MODELS_TIMEOUT_S, max_bytes=MODELS_BYTES_MAX)
        try:
            return tuple(dict.fromkeys(model.id for model in _models(body).data))
        except _NOT_JSON as error:
            raise ProviderNonsense("The provider answered with something that is not a list of models.") from error

    def continues(self, model: str) -> Continues:  # noqa: ARG002
        return Continues.NO

    def fingerprint(self, model: str) -> ModelFingerprint | None:  # noqa: ARG002
        return None

    def attach(self, tell: Tell) -> None:
        """Whether it can serve shows with each request."""

    def listen(self, heard: Heard) -> None:
        self._heard = heard

    async def aclose(self) -> None:
        await self._upstream.aclose()

    async def _stream(self, job: Job) -> AsyncGenerator[Chunk, None]:
        reader, events = self._reader(), EventSplitter(self._settings.max_event_bytes)
        reader.habits.request = job.body
        patience = self._patience(job)
        answer = await self._ask(job, patience)
        try:
            await must_be(STREAM, answer, patience)
            at_end, tokens = False, 0
            with self._turns.stream():
                while not (reader.done or at_end):
                    gather = self._turns.gather if tokens else None  # the first one waits for nothing
                    data = await answer.read(patience, gather=gather)
                    at_end = not data
                    chunk = reader.events(events.feed(data) if data else events.end())
                    if chunk is not None:
                        tokens += chunk.tokens
                        yield chunk
                        patience.renew()  # and only now: how long our caller took is not the provider's fault
                    reader.check_well()
            reader.check_complete()
        except BaseException:
            answer.close()
            raise
        answer.let_go()

    async def _whole(self, job: Job) -> AsyncGenerator[Chunk, None]:
        patience = self._patience(job)
        answer = await self._ask(job, patience)
        reader = self._reader()
        reader.habits.request = job.body
        try:
            await must_be(_JSON, answer, patience)
            body = await answer.read_all(self._settings.max_response_bytes, patience)
            chunk = reader.body(body)
        finally:
            answer.close()
        yield chunk

    async def _ask(self, job: Job, patience: Patience) -> UpstreamAnswer:
        answer = await self._upstream.ask("POST", "/chat/completions", body=self._body(job), patience=patience, job=job)
        self._heard(answer.headers)
        return answer

    def _reader(self) -> ChunkReader:
        return ChunkReader()

    def _key_headers(self, key: str) -> dict[str, str]:
        """How the key is sent."""
        return {"Authorization": f"Bearer {key}"}

    def _body(self, job: Job) -> bytes:
        return rewritten(job, self.upstream_model(job.model))

    def _patience(self, job: Job) -> Patience:
        return Patience.with_job(job.timeouts, self._settings, clock=asyncio.get_running_loop().time)


async def must_be(content_type: str, answer: UpstreamAnswer, patience: Patience) -> None:
    """Raises: what the answer is, if it isn't a success of this type."""
    stated = answer.content_type
    if answer.status == 200 and stated in (content_type, *UNTYPED):
        return
    body = await answer.read_some(ERROR_BODY_BYTES_MAX, patience)
    said = complaint(body)
    if answer.status != 200:
        raise refusal(answer.status, said, retry_after_s=retry_after_s(answer.headers))
    if stated == _JSON and said.stated:  # an error in a 200, where a stream should be
        raise refusal_inside(said)
    raise ProviderNonsense(f"The provider answered with {stated!r} where {content_type!r} is expected.")


def rewritten(job: Job, upstream_model: str, *, ask_usage: bool = True) -> bytes:
    """The client's body with the provider's name of the model, and for a stream with the usage asked for.

    Without *ask_usage*, for a provider that refuses to be asked, there are no stream options at all. Every other member, known
    or not, goes on byte for byte.
    Raises: ProviderRejected if the body is not a JSON object.
    """
    try:
        members = _members(job.body)
    except _NOT_JSON as error:
        raise ProviderRejected("The body is not a JSON object.", status=400, type_="invalid_request_error") from error
    members["model"] = Raw(_encode(upstream_model))
    if job.stream:
        members["stream"] = _TRUE
        if ask_usage:
            members["stream_options"] = _with_usage(members.get("stream_options"))
        else:
            members.pop("stream_options", None)
    elif "stream" in members:
        members["stream"] = _FALSE
    return _encode(members)


def _with_usage(options: Raw | None) -> Raw:
    if options is None:
        return _USAGE_WANTED
    try:
        members = _members(options)
    except msgspec.DecodeError:  # null, or something for the provider to refuse
        return _USAGE_WANTED if bytes(options) == b"null" else options
    members["include_usage"] = _TRUE
    return Raw(_encode(members))


def address(route: RouteSettings) -> str:
    """Where the route's provider is. Raises: SetupError if that is no address."""
    base_url = route.base_url or OPENAI_URL
    if not _is_address(base_url):
        raise SetupError(
            f"route {route.id!r}: base_url must be http:// or https:// and a host; keys belong in api_keys"
        )
    return base_url


def _is_address(base_url: str) -> bool:
    try:
        url = yarl.URL(base_url)
        return url.scheme in ("http", "https") and bool(url.host) and url.user is None and url.password is None
    except ValueError:
        return False


def first_key(route: RouteSettings) -> str | None:
    """The first of the route's keys that can be read; None if it has none.

    Raises: SetupError if it has some and none can be read.
    """
    missing: SetupError | None = None
    for reference in route.api_keys:
        try:
            key = secret(reference)
        except SetupError as error:
            missing = missing or error
            continue
        if not key.isascii() or not key.isprintable():
            raise SetupError(f"route {route.id!r}: the key {reference} has characters that no header can carry")
        return key
    if missing is not None:
        raise SetupError(f"route {route.id!r}: {missing.message}") from missing
    return None
