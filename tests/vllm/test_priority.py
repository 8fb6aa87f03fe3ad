"""An engine of the worker's own lets requests that have time wait for the others, whoever came first."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from schemas.ids import RouteId
from schemas.settings import ModelSettings, RouteSettings, VllmSettings, WorkerSettings
from tests.factories import make_job
from tests.integration.providers.heard import hear
from tests.vllm.conftest import require_vllm
from tests.vllm.deployment import own_flags
from tests.vllm.engine import ENVIRONMENT, HERE, MODEL, tiny_model_folder
from tests.vllm.tiny_model import COUNT
from tests.waiting import eventually
from workers.providers.vllm import Vllm

pytestmark = [pytest.mark.vllm, pytest.mark.gpu, pytest.mark.timeout(300)]

FIRST, LATER = 2000, 200  # tokens


async def test_a_request_that_has_time_goes_last(tmp_path: Path) -> None:
    """One runs at a time; two that have time wait for it already when one that has none comes."""
    require_vllm()
    own = VllmSettings(
        model=str(tiny_model_folder()),
        command=(sys.executable, str(HERE / "vllm_cli.py")),
        args=(*own_flags(), "--max-num-seqs=1"),
        environ=ENVIRONMENT,
    )
    route = RouteSettings(
        id=RouteId("r"),
        provider="vllm",
        max_concurrency=8,
        models=(ModelSettings(name="m", upstream=MODEL),),
        vllm=own,
    )
    provider = Vllm.from_route(route, WorkerSettings(run_folder=str(tmp_path)))
    told: list[str | None] = []
    provider.attach(told.append)
    try:
        await eventually(lambda: told[-1] is None, timeout_s=180, what="the engine is ready")
        assert provider.powers.priority
        ended: list[str] = []

        async def ask(name: str, tokens: int, **members: object) -> None:
            body = {"messages": COUNT.messages, "ignore_eos": True, "max_tokens": tokens, "stream": True, **members}
            await hear(provider, make_job(body))
            ended.append(name)

        first = asyncio.create_task(ask("first", FIRST))
        await eventually(lambda: waits(provider, 1, 0), timeout_s=10, what="the first runs")
        flex = [asyncio.create_task(ask("flex", LATER, service_tier="flex")) for _ in range(2)]
        await eventually(lambda: waits(provider, 1, 2), timeout_s=10, what="two wait")
        await asyncio.gather(first, *flex, ask("urgent", LATER))
        assert ended == ["first", "urgent", "flex", "flex"]
    finally:
        await provider.aclose()


async def waits(provider: Vllm, running: int, waiting: int) -> bool:
    await provider._server.look()
    stats = provider.stats()
    return stats is not None and (stats.running, stats.waiting) == (running, waiting)
