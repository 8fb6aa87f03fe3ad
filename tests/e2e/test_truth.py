"""What the ledger says, the client saw and the provider counted are the same."""

from __future__ import annotations

import asyncio
import csv
import json
from decimal import Decimal
from typing import Any

import pytest

from schemas.ids import new_id
from tests.e2e.asking import Heard, ask, read, row
from tests.e2e.deployment import (
    CACHED_PICO,
    INPUT_PICO,
    MODEL,
    OUTPUT_PICO,
    UPSTREAM_MODEL,
    Deployment,
    Provider,
)
from tests.waiting import eventually

PICO = Decimal("1e-12")
OPEN_ATTEMPT = """SELECT 1 FROM attempts JOIN requests USING (request_id)
    WHERE attempts.outcome = 'open' AND requests.status = 'open' AND NOT requests.stream"""
SECRET = "the-prompt-that-nobody-may-keep"

pytestmark = pytest.mark.timeout(60)


def _cost(told: dict[str, Any]) -> Decimal:
    fresh: int = told["prompt_tokens"] - told["cached_tokens"]
    pico = fresh * INPUT_PICO + told["cached_tokens"] * CACHED_PICO + told["completion_tokens"] * OUTPUT_PICO
    return PICO * int(pico)


def _is(told: dict[str, Any], **expected: Any) -> None:
    assert {name: told[name] for name in expected} == expected


async def test_a_completed_request_is_told_as_the_provider_counted_it(up: Deployment, provider: Provider) -> None:
    async with up.sdk() as client:
        whole, stream, several = await ask(client), await read(client, "one two"), await ask(client, "a b", n=3)
    assert (whole.text, stream.text, several.text) == ("one two three", "one two", "a b|a b|a b")
    for heard, streamed, tokens in ((whole, False, 3), (stream, True, 2), (several, False, 6)):
        told = await row(up, heard.request_id)
        _is(
            told,
            model=MODEL,
            route="mock",
            status="completed",
            http_status=200,
            code=None,
            stream=streamed,
            completion_tokens=tokens,
            estimated=False,
            cached=False,
            attempts=1,
            migrations=0,
            finish_reason="stop",
            org="default",
        )
        assert heard.tokens == tokens
        assert told["cached_tokens"] > 0
        assert Decimal(told["cost_usd"]) == _cost(told) > 0
        assert 0 <= told["queue_ms"] <= told["first_token_ms"] <= told["duration_ms"] < 10_000
        assert len(told["prompt_hash"]) == 64
        assert told["key_id"].startswith("key_")
    assert [seen["body"]["model"] for seen in provider.seen()] == [UPSTREAM_MODEL] * 3


async def test_a_cancelled_stream_is_billed_for_what_was_delivered(up: Deployment, provider: Provider) -> None:
    provider.script(tokens=2000, pace_s=0.005)
    async with up.sdk() as client:
        heard = await read(client, leave_after=10)
    told = await row(up, heard.request_id)
    _is(told, status="cancelled", http_status=499, code="client_left", stream=True, estimated=True, finish_reason=None)
    await eventually(lambda: provider.answering() == 0)
    (seen,) = provider.seen()
    assert seen["gone_s"] is not None
    assert len(heard.text.split()) <= told["completion_tokens"] <= seen["tokens_sent"] < 500
    assert Decimal(told["cost_usd"]) == _cost(told) > 0

    def attempt() -> list[dict[str, Any]]:
        return up.sql("SELECT * FROM attempts WHERE request_id = ? AND outcome <> 'open'", heard.request_id)

    (tried,) = await eventually(attempt)
    _is(tried, outcome="cancelled", code="client_left", upstream_model=UPSTREAM_MODEL, provider="openai", epoch=1)
    assert told["completion_tokens"] <= tried["tokens_sent"] <= seen["tokens_sent"]


async def test_tries_with_one_idempotency_key_are_one_request_with_one_bill(up: Deployment, provider: Provider) -> None:
    provider.script(tokens=5, pace_s=0.05)
    key = {"Idempotency-Key": new_id()}
    async with up.sdk() as client:
        heard = await asyncio.gather(*(read(client, key["Idempotency-Key"], extra_headers=key) for _ in range(4)))
        heard.append(await read(client, key["Idempotency-Key"], extra_headers=key))
    assert len(set(heard)) == 1
    assert len(provider.seen()) == 1
    request_id = heard[0].request_id
    told = await row(up, request_id)
    _is(told, status="completed", completion_tokens=5)

    def tries() -> list[dict[str, Any]]:
        return up.sql("SELECT payload FROM events WHERE kind = 'request.replayed' AND request_id = ?", request_id)

    await eventually(lambda: len(tries()) == 4)
    (same,) = up.sql("SELECT * FROM requests WHERE prompt_hash = ?", told["prompt_hash"])
    assert Decimal(same["cost_usd"]) == _cost(told) > 0
    text = await asyncio.to_thread(up.command, "explain", request_id)
    assert "told again after its end (idempotency_key), from the beginning" in str(text)


async def test_a_cancelled_answer_costs_its_prompt(up: Deployment, provider: Provider) -> None:
    provider.script(delay_s=20)
    async with up.sdk() as client:
        asking = asyncio.create_task(ask(client, SECRET))
        await eventually(lambda: provider.answering() == 1)
        await eventually(lambda: up.sql(OPEN_ATTEMPT), what="that the ingress knows of the attempt, too")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: provider.answering() == 0)
    (told,) = await eventually(
        lambda: up.sql(
            "SELECT * FROM requests WHERE status = 'cancelled' AND NOT stream ORDER BY accepted_at DESC LIMIT 1"
        )
    )
    _is(told, http_status=499, code="client_left", completion_tokens=0, estimated=True)
    assert Decimal(told["cost_usd"]) == _cost(told) > 0


async def test_a_failed_request_costs_nothing_or_what_it_delivered(up: Deployment, provider: Provider) -> None:
    async with up.sdk() as client:
        provider.script(status=500)
        before = await ask(client)
        provider.script(status=400, error={"message": "too long", "code": "context_length_exceeded"})
        refused = await read(client)
        provider.script(tokens=10, cut_at=4)
        amid = await read(client)
    assert (before.status, before.code) == (502, "upstream_error")
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert (amid.status, amid.code, amid.text) == (200, "upstream_error", "w0 w1 w2 w3")
    _is(await row(up, before.request_id), status="failed", http_status=502, code="upstream_error", completion_tokens=0)
    _is(await row(up, refused.request_id), status="failed", http_status=400, code="upstream_rejected", stream=True)
    told = await row(up, amid.request_id)
    _is(told, status="failed", http_status=200, code="upstream_error", completion_tokens=4, estimated=True)
    assert Decimal(told["cost_usd"]) == _cost(told) > 0
    for heard in (before, refused):
        assert Decimal((await row(up, heard.request_id))["cost_usd"]) == 0


async def test_a_rejected_request_is_there_with_its_reason(up: Deployment, provider: Provider) -> None:
    async with up.sdk() as client, up.sdk(key="sk-wrong") as stranger:
        bad = await ask(client, temperature="hot")
        unknown = await ask(client, model="nobody/knows")
        wrong = await ask(stranger)
    _is(await row(up, bad.request_id), status="rejected", http_status=400, code="invalid_request", route=None)
    _is(await row(up, unknown.request_id), status="rejected", http_status=404, model="nobody/knows")
    _is(await row(up, wrong.request_id), status="rejected", http_status=401, code="invalid_api_key", key_id=None)
    assert provider.seen() == []


async def test_over_many_requests_of_every_kind_the_sums_are_the_providers(up: Deployment, provider: Provider) -> None:
    """Both count on their own: the ledger from events, the provider from what it sent."""
    provider.script(tokens=8, pace_s=0.002)
    async with up.sdk() as client:

        async def one(number: int) -> Heard:
            match number % 5:
                case 0 | 1:
                    return await ask(client, f"{number}")
                case 2 | 3:
                    return await read(client, f"{number}")
                case _:
                    long = {"mock": {"tokens": 5000, "pace_s": 0.002}}
                    return await read(client, f"{number}", leave_after=3, extra_body=long)

        heard = await asyncio.gather(*(one(number) for number in range(100)))
    ids = [each.request_id for each in heard]
    marks = ", ".join("?" * len(ids))
    over = f"FROM requests WHERE request_id IN ({marks}) AND status <> 'open'"

    def all_of_them() -> bool:
        return bool(up.sql(f"SELECT count(*) AS n {over}", *ids)[0]["n"] == len(ids))

    await eventually(all_of_them, every_s=0.1)
    (sums,) = up.sql(
        f"""SELECT count(*) AS n, count(DISTINCT request_id) AS ids, sum(completion_tokens) AS tokens, sum(cost_usd) AS cost,
        sum(CASE WHEN status = 'completed' THEN completion_tokens END) AS completed {over}""",
        *ids,
    )
    assert sums["n"] == sums["ids"] == len(ids)
    seen = {int(each["body"]["messages"][0]["content"]): each for each in provider.seen()}
    assert len(seen) == len(ids)
    assert sums["completed"] == sum(each["tokens_sent"] for number, each in seen.items() if number % 5 != 4) == 80 * 8
    rows = {told["request_id"]: told for told in up.sql(f"SELECT * {over}", *ids)}
    for number, each in enumerate(heard):
        told = rows[each.request_id]
        if number % 5 == 4:
            _is(told, status="cancelled", code="client_left")
            assert len(each.text.split()) <= told["completion_tokens"] <= seen[number]["tokens_sent"]
        else:
            _is(told, status="completed", completion_tokens=8)
    assert Decimal(sums["cost"]) == sum((_cost(told) for told in rows.values()), Decimal(0))
    assert int(sums["tokens"]) == sum(told["completion_tokens"] for told in rows.values())


async def test_the_command_line_shows_what_the_endpoint_says(up: Deployment) -> None:
    async with up.sdk() as client:
        heard = await ask(client)
    told = await row(up, heard.request_id)
    asked = f"select model, status, completion_tokens, cost_usd from requests where request_id = '{heard.request_id}'"
    table, as_csv, as_json, life = await asyncio.gather(
        asyncio.to_thread(up.command, "sql", asked),
        asyncio.to_thread(up.command, "sql", asked, "--format", "csv"),
        asyncio.to_thread(up.command, "sql", asked, "--format", "json"),
        asyncio.to_thread(up.command, "explain", heard.request_id),
    )
    expected = [MODEL, "completed", "3", told["cost_usd"]]
    assert table.splitlines()[1].split() == expected
    assert list(csv.reader(as_csv.splitlines()))[1] == expected
    assert [str(cell) for cell in json.loads(as_json)["rows"][0]] == expected
    assert life.index("accepted: ") < life.index("attempt 1 started") < life.index("completed with HTTP 200")


async def test_prompts_answers_and_keys_are_nowhere(up: Deployment) -> None:
    async with up.sdk() as client:
        heard = await ask(client, SECRET)
    assert heard.text == SECRET
    await row(up, heard.request_id)
    kept = json.dumps(up.sql("SELECT payload::VARCHAR AS payload FROM events")) + up.log()
    ready = up.ready()
    assert heard.request_id in kept
    for secret in (SECRET, ready["api_key"], ready["admin_key"], ready["nats_url"]):
        assert secret not in kept


async def test_the_embedded_services_answer_what_a_fresh_user_asks(up: Deployment) -> None:
    """The model echo is always there, and the list says so."""
    async with up.sdk() as client:
        models = [model.id async for model in client.models.list()]
        heard = await read(client, "hello there", model="echo")
    assert models == sorted(["echo", MODEL])
    assert heard.text == "hello there"
    _is(await row(up, heard.request_id), model="echo", route="echo", status="completed", completion_tokens=heard.tokens)
