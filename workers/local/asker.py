"""Small questions to one server on this machine, with small bounds: nothing that could load a model or wait for one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from schemas.errors import ProviderFailed
from schemas.settings import WorkerSettings
from workers.providers.patience import Patience
from workers.providers.upstream import Upstream

ANSWER_BYTES_MAX = 4 * 1024 * 1024
CONNECTIONS_MAX = 2

_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Said:
    """An answer. *body* is what its JSON says, None if it is none; *server* its header of that name."""

    status: int
    body: Any
    server: str = ""

    @property
    def members(self) -> dict[str, Any]:
        """Of a body that is an object and no error. LM Studio says 200 to everything, and the truth in the body."""
        if self.status != 200 or not isinstance(self.body, dict) or self.body.get("error"):
            return {}
        return self.body


class Asker:
    """*address* is ``host:port``."""

    def __init__(self, address: str, settings: WorkerSettings, *, answer_wait_s: float) -> None:
        self.address = address
        self._answer_wait_s = answer_wait_s
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._upstream = Upstream(f"http://{address}", headers, max_concurrency=CONNECTIONS_MAX, settings=settings)

    async def get(self, path: str) -> Said:
        """Raises: ProviderUnreachable if nobody listens, another Fault if the answer doesn't come or is none."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: object) -> Said:
        """Raises: as `get`."""
        return await self._ask("POST", path, msgspec.json.encode(body))

    async def aclose(self) -> None:
        await self._upstream.aclose()

    async def _ask(self, method: str, path: str, body: bytes | None) -> Said:
        clock, wait_s = asyncio.get_running_loop().time, self._answer_wait_s
        patience = Patience(first_s=wait_s, idle_s=wait_s, total_s=wait_s, clock=clock)
        answer = await self._upstream.ask(method, path, body=body, patience=patience)
        try:
            raw = await answer.read_some(ANSWER_BYTES_MAX + 1, patience)
            if answer.cut and len(raw) <= ANSWER_BYTES_MAX:
                raise ProviderFailed("The server's answer ended early.")
        finally:
            answer.close()
        try:
            said = msgspec.json.decode(raw)
        except _NOT_JSON:
            said = None
        return Said(answer.status, said, answer.headers.get("server", ""))
