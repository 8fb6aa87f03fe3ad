"""What a vLLM says of itself beside its answers: whether it lives, how it is doing, how much room it has.

Asked on connections of its own, so that a full server's jobs are not in the way, and never waited for by a job for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import msgspec
from msgspec import Struct

from schemas.errors import Fault, ProviderUnreachable
from schemas.jobs import EngineStats
from schemas.settings import WorkerSettings
from workers.providers.patience import Patience
from workers.providers.upstream import Upstream
from workers.providers.vllm_metrics import METRICS_PATHS, SEQUENCES_MAX, Numbers, read, room

ANSWER_WAIT_S = 2.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
CONNECTIONS_MAX = 2
API_PATH = "/v1"


class Health(Enum):
    UP = "up"
    DEAD = "dead"  # its front end says so, or is gone
    UNKNOWN = "unknown"  # no answer in time, or no such question here


class _Card(Struct):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Cards(Struct):
    data: tuple[_Card, ...]


class _Text(Struct):
    prompt: str


_encode = msgspec.json.encode
_text = msgspec.json.Decoder(_Text).decode
_cards = msgspec.json.Decoder(_Cards).decode


class VllmServer:
    """*base_url* is the API's, ``/v1`` included; what is asked here lies beside that."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        settings: WorkerSettings,
        socket: Path | None = None,
        sequences_max: int = SEQUENCES_MAX,
    ) -> None:
        self.stats: EngineStats | None = None
        self.room: int | None = None
        self.root: str | None = None  # what it was told to serve: a name or a folder
        self.context_tokens: int | None = None
        base_url = base_url.rstrip("/")
        root = base_url.removesuffix(API_PATH)
        self._models_path = f"{base_url[len(root) :]}/models"
        self._sequences_max = sequences_max
        self._metrics_path: str | None = None  # where it tells its numbers, if it does
        sent = {"Content-Type": "application/json", **headers}
        self._upstream = Upstream(root, sent, max_concurrency=CONNECTIONS_MAX, settings=settings, socket=socket)

    async def learn(self, model: str) -> None:
        """To be called when it has (again) become ready: what it serves, and how much room it has."""
        self.stats, self.room, self._metrics_path = None, None, None
        card = await self._card(model)
        self.root, self.context_tokens = card.root, card.max_model_len
        for path in METRICS_PATHS:
            if (numbers := await self._numbers(path)) is not None:
                self._metrics_path = path
                self.stats = numbers.stats
                self.room = room(
                    numbers.cache_tokens, context_tokens=card.max_model_len, sequences_max=self._sequences_max
                )
                break

    async def look(self) -> None:
        """Asks for its numbers again, if it has any. Without an answer there are none."""
        numbers = None if self._metrics_path is None else await self._numbers(self._metrics_path)
        self.stats = None if numbers is None else numbers.stats

    async def health(self) -> Health:
        try:
            status, _ = await self._ask("/health")
        except ProviderUnreachable:
            return Health.DEAD
        except Fault:
            return Health.UNKNOWN
        return {200: Health.UP, 503: Health.DEAD}.get(status, Health.UNKNOWN)

    async def text_of(self, model: str, ids: tuple[int, ...]) -> str | None:
        """What its tokenizer makes of *ids*; None if it doesn't say."""
        try:
            status, body = await self._ask("/detokenize", _encode({"model": model, "tokens": ids}))
            return _text(body).prompt if status == 200 else None
        except (Fault, msgspec.MsgspecError):
            return None

    async def aclose(self) -> None:
        await self._upstream.aclose()

    async def _card(self, model: str) -> _Card:
        body = await self._get(self._models_path)
        try:
            cards = () if body is None else _cards(body).data
        except (msgspec.MsgspecError, UnicodeDecodeError):
            cards = ()
        return next((card for card in cards if card.id == model), _Card(id=model))

    async def _numbers(self, path: str) -> Numbers | None:
        body = await self._get(path)
        return None if body is None else read(body.decode(errors="replace"))

    async def _get(self, path: str) -> bytes | None:
        try:
            status, body = await self._ask(path)
        except Fault:
            return None
        return body if status == 200 else None

    async def _ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Raises: Fault."""
        clock = asyncio.get_running_loop().time
        patience = Patience(first_s=ANSWER_WAIT_S, idle_s=ANSWER_WAIT_S, total_s=ANSWER_WAIT_S, clock=clock)
        answer = await self._upstream.ask("GET" if body is None else "POST", path, body=body, patience=patience)
        try:
            return answer.status, await answer.read_some(ANSWER_BYTES_MAX, patience)
        finally:
            answer.close()
