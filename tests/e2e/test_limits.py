"""A provider's plan is kept to by all workers of a deployment together."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.e2e.asking import ask
from tests.e2e.deployment import UPSTREAM_MODEL, Provider, http, penstock_up

REQUESTS_A_MINUTE = 6
AT_ONCE = 5
CLIENTS = 14
WAIT_S = 4  # less than the rest of a minute
CONFIG = f"""
[[routes]]
id = "limited"
provider = "openai"
base_url = "{{base_url}}"
max_concurrency = {AT_ONCE}
requests_per_minute = {REQUESTS_A_MINUTE}

[[routes.models]]
name = "limited"
upstream = "{UPSTREAM_MODEL}"
"""


@pytest.mark.timeout(120)
async def test_two_workers_share_what_the_plan_allows(provider: Provider, tmp_path: Path) -> None:
    more = CONFIG.format(base_url=provider.base_url)
    with penstock_up(tmp_path, provider, settings={"PENSTOCK_UP_WORKERS": "2"}, config_more=more) as up:
        waiting = {"x-penstock-timeout-queue": str(WAIT_S)}
        async with up.sdk() as client:
            asked = (ask(client, model="limited", extra_headers=waiting) for _ in range(CLIENTS))
            heard = await asyncio.gather(*asked)
        ready = up.ready()
        routes = http(f"{ready['base_url'].removesuffix('/v1')}/admin/v1/routes", key=ready["admin_key"])["data"]
    assert len(provider.seen()) == REQUESTS_A_MINUTE
    assert sorted(each.status for each in heard if each.status) == [200] * REQUESTS_A_MINUTE + [504] * (
        CLIENTS - REQUESTS_A_MINUTE
    )
    rows = [row for row in routes if row["route"] == "limited"]
    assert sum(row["slots"] for row in rows) == AT_ONCE // 2 * 2
    assert up.process.returncode == 0
    assert up.complaints() == []
