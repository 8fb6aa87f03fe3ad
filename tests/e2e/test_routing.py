"""Routing as an operator configures it and asks about it: the file, the command line, and the life of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.e2e.asking import ask
from tests.e2e.deployment import MODEL, Deployment, Provider, penstock_up
from tests.waiting import eventually

CONFIG = f"""
[[routes]]
id = "cheap"
provider = "openai"
base_url = "{{base_url}}"
own = false
models = [{{{{ name = "{MODEL}", price = {{{{ input = 0.01, output = 0.02 }}}} }}}}]

[[routes]]
id = "far"
provider = "openai"
base_url = "{{base_url}}"
own = false
weight = 3
parameters = ["temperature"]
models = [{{{{ name = "{MODEL}", price = {{{{ input = 5, output = 5 }}}} }}}}]

[routing]
strategy = [
  {{{{ routes = ["own"], strategy = "least_busy" }}}},
  "cheapest",
]
models = {{{{ echo = ["own_first", "fastest"] }}}}
"""


@pytest.fixture(scope="module")
def routed(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    more = CONFIG.format(base_url=provider.base_url)
    with penstock_up(tmp_path_factory.mktemp("routed"), provider, config_more=more) as running:
        yield running
    assert running.process.returncode == 0
    assert running.complaints() == []


async def told(up: Deployment, request_id: str) -> str:
    """What `penstock explain` says, once the ledger has it."""
    for _ in range(100):
        if up.sql("select 1 as one from requests where request_id = ? and status <> 'open'", request_id):
            break
        await asyncio.sleep(0.05)
    return await asyncio.to_thread(up.command, "explain", request_id)


async def test_the_file_orders_the_routes_and_explain_says_why(routed: Deployment) -> None:
    async with routed.sdk() as client:
        heard = await ask(client)
        wished = await ask(
            client, extra_body={"provider": {"sort": "price", "max_price": {"prompt": 1}}, "models": ["x"]}
        )
    life = await told(routed, heard.request_id)
    assert (
        "plan mock (of own, 0 of 32 slots taken) → cheap ($0.01 in and $0.02 out) → far ($5 in and $5 out)"
    ) in " ".join(life.split())
    life = " ".join((await told(routed, wished.request_id)).split())
    assert "plan cheap ($0.01 in and $0.02 out) → mock ($0.15 in and $0.6 out)" in life
    assert "left out: far (over provider.max_price), all routes as x (no such model here)" in life


async def test_explain_says_what_was_tried_and_why_it_came_to_nothing(routed: Deployment, provider: Provider) -> None:
    absent = {"status": 404, "error": {"message": "no model", "code": "model_not_found"}, "delay_s": 0.5}
    provider.script(**absent)
    seen = len(provider.seen())
    async with routed.sdk() as client:
        asking = asyncio.create_task(ask(client))
        await eventually(lambda: len(provider.seen()) > seen)
        provider.script()
        heard = await asking
    assert heard.text == "one two three"
    life = " ".join((await told(routed, heard.request_id)).split())
    assert "attempt 1 given up: upstream_rejected" in life
    assert "on mock, HTTP 404); at our cost: " in life
    assert "attempt 2 completed" in life
    assert "2 attempts" in life
    tried = "select route, outcome, code from attempts where request_id = ? order by epoch"
    assert [(each["route"], each["outcome"], each["code"]) for each in routed.sql(tried, heard.request_id)] == [
        ("mock", "lost", "upstream_rejected"),
        ("cheap", "completed", None),
    ]
    spent = (
        "select payload->>'code' as code, (payload->>'cost_pico')::bigint as pico "
        "from events where kind = 'attempt.lost' and request_id = ?"
    )
    (ours,) = routed.sql(spent, heard.request_id)
    assert ours["code"] == "upstream_rejected"
    assert int(ours["pico"]) > 0


async def test_a_key_is_made_with_its_time_outs(routed: Deployment, provider: Provider) -> None:
    made = ["keys", "create", "--name", "hasty", "--timeout-first-token-s", "0.3", "--timeout-total-s", "30"]
    key = (await asyncio.to_thread(routed.command, *made)).strip()
    provider.script(delay_s=5)
    async with routed.sdk(key=key) as client:
        heard = await ask(client)
    provider.script()
    assert (heard.status, heard.code) == (504, "first_token_timeout")


async def test_a_key_is_made_with_its_limits(routed: Deployment) -> None:
    limits = ["--model", MODEL, "--route", "cheap", "--route", "far", "--max-prompt-price", "0.5"]
    key = (await asyncio.to_thread(routed.command, "keys", "create", "--name", "bounded", *limits)).strip()
    async with routed.sdk(key=key) as client:
        heard = await ask(client)
        assert (heard.status, heard.text) == (200, "one two three")
        assert (await ask(client, model="echo")).code == "insufficient_permissions"
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError, match=r"cheap \(in provider\.ignore\)"):
            await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "x"}],
                extra_body={"provider": {"ignore": ["cheap"]}},
            )
    life = await told(routed, heard.request_id)
    assert "plan cheap ($0.01 in and $0.02 out); " in life
    assert "left out: mock (its key may not use this route), far (its key may not use a route of this price)" in life
    listed = await asyncio.to_thread(routed.command, "keys", "list")
    (line,) = [line for line in listed.splitlines() if "bounded" in line]
    assert line.endswith(f"{MODEL}\tcheap, far")
