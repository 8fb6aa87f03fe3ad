"""The SQL endpoint as a program meets it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pyarrow.parquet as pq
import pytest

from bus.server import EmbeddedServer
from ledger.server import BODY_MAX_BYTES
from schemas.control import Role
from tests.integration.ledger.conftest import ANALYST_KEY, CLIENT_KEY, RunningLedger, sha256
from tests.unit.ledger import samples
from tests.waiting import eventually

ENDLESS = {"sql": "select count(*) from range(1000000000000)"}


@pytest.fixture
async def http(ledger: RunningLedger) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(ledger.url, headers={"authorization": f"Bearer {ANALYST_KEY}"}) as session:
        yield session


async def ask(http: aiohttp.ClientSession, sql: str, **more: Any) -> tuple[int, Any]:
    async with http.post("/v1/sql", json={"sql": sql, **more}) as response:
        body = await response.read()
        return response.status, json.loads(body) if response.content_type == "application/json" else body


async def refusal(response: aiohttp.ClientResponse) -> tuple[int, str]:
    error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    return response.status, error["code"]


async def test_an_analyst_asks_what_happened(ledger: RunningLedger, http: aiohttp.ClientSession) -> None:
    await ledger.say(*samples.whole())
    status, answer = await ask(http, "select model, status, completion_tokens, cost_usd from requests")
    assert status == 200
    assert answer["columns"][3] == {"name": "cost_usd", "type": "DECIMAL(38,12)"}
    assert answer["rows"] == [["m", "completed", 10, "0.000008700000"]]
    assert (answer["row_count"], answer["truncated"]) == (1, False)


async def test_each_format_has_its_media_type(ledger: RunningLedger, http: aiohttp.ClientSession) -> None:
    await ledger.say(*samples.whole())
    types = {}
    for format_ in ("json", "csv", "arrow", "parquet"):
        async with http.post("/v1/sql", json={"sql": "from requests", "format": format_}) as response:
            types[format_] = response.content_type
            body = await response.read()
            assert response.headers["x-penstock-truncated"] == "false"
            assert response.headers["x-penstock-rows"] == "1"
    assert types["csv"] == "text/csv"
    assert pq.read_table(io.BytesIO(body)).num_rows == 1


async def test_a_cut_result_says_so(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/sql", json={"sql": "from range(1000)"}) as response:
        assert response.headers["x-penstock-truncated"] == "true"
        assert (await response.json())["truncated"] is True


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, (401, "invalid_api_key")),
        ("Bearer wrong", (401, "invalid_api_key")),
        ("Bearer ", (401, "invalid_api_key")),
        (f"Basic {ANALYST_KEY}", (401, "invalid_api_key")),
        (f"Bearer {CLIENT_KEY}", (403, "insufficient_permissions")),
    ],
)
async def test_only_analysts_and_admins_may_ask(
    ledger: RunningLedger, header: str | None, expected: tuple[int, str]
) -> None:
    headers = {} if header is None else {"authorization": header}
    async with (
        aiohttp.ClientSession(ledger.url, headers=headers) as http,
        http.post("/v1/sql", json={"sql": "select 1"}) as response,
    ):
        assert await refusal(response) == expected
        assert ("www-authenticate" in response.headers) == (expected[0] == 401)


async def test_a_key_works_when_it_is_stated_and_not_when_it_is_revoked(
    ledger: RunningLedger, http: aiohttp.ClientSession
) -> None:
    headers = {"authorization": "Bearer sk-new"}

    async def status() -> int:
        async with http.post("/v1/sql", json={"sql": "select 1"}, headers=headers) as response:
            return response.status

    assert await status() == 401
    new = {"key_id": "key_new", "role": Role.ADMIN}
    await ledger.state(samples.key_stated(sha256("sk-new"), **new))
    assert await status() == 200
    await ledger.state(samples.key_stated(sha256("sk-new"), revoked=True, **new))
    assert await status() == 401


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"select 1"',
        b'{"sql": 1}',
        b'{"sql": "select 1", "params": {}}',
        b'{"sql": "select 1", "format": "xml"}',
        b'{"sql": "select 1", "fromat": "csv"}',
        b'{"sql": "select \xff"}',
        b'{"query": "select 1"}',
    ],
)
async def test_a_body_that_makes_no_sense_is_a_clear_400(http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post("/v1/sql", data=body) as response:
        assert await refusal(response) == (400, "invalid_request")


async def test_a_body_over_the_limit_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/sql", data=io.BytesIO(b'{"sql": "' + b" " * BODY_MAX_BYTES + b'"}')) as response:
        assert await refusal(response) == (413, "body_too_large")


async def test_errors_of_the_sql_have_the_databases_words(http: aiohttp.ClientSession) -> None:
    status, answer = await ask(http, "select nothing from requests")
    assert (status, answer["error"]["code"]) == (400, "sql_error")
    assert 'Referenced column "nothing" not found' in answer["error"]["message"]
    status, answer = await ask(http, "delete from events")
    assert (status, answer["error"]["code"]) == (400, "sql_refused")


@pytest.mark.parametrize("sql_timeout_s", [1.0])
async def test_a_query_over_the_time_limit_is_a_504(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/sql", json=ENDLESS) as response:
        assert await refusal(response) == (504, "sql_timeout")


@pytest.mark.parametrize("sql_timeout_s", [2.0])
async def test_one_query_too_many_is_a_429_with_retry_after(ledger: RunningLedger, http: aiohttp.ClientSession) -> None:
    running = [asyncio.create_task(ask(http, ENDLESS["sql"])) for _ in range(2)]
    await eventually(lambda: ledger.queries.running == 2)
    async with http.post("/v1/sql", json={"sql": "select 1"}) as response:
        assert await refusal(response) == (429, "too_many_queries")
        assert int(response.headers["retry-after"]) >= 1
    assert {status for status, _ in await asyncio.gather(*running)} == {504}


async def test_a_client_that_leaves_takes_its_query_with_it(ledger: RunningLedger) -> None:
    headers = {"authorization": f"Bearer {ANALYST_KEY}"}
    async with aiohttp.ClientSession(ledger.url, headers=headers) as http:
        task = asyncio.create_task(ask(http, ENDLESS["sql"]))
        await eventually(lambda: ledger.queries.running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: ledger.queries.running == 0, timeout_s=0.8, what="the query is given up before its limit")


async def test_half_a_body_leaves_nothing_behind(ledger: RunningLedger) -> None:
    host, port = ledger.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/sql HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ANALYST_KEY}\r\ncontent-length: 100\r\n\r\n"
    writer.write(head.encode() + b'{"sql"')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with aiohttp.ClientSession(ledger.url) as http, http.get("/healthz") as response:
        assert response.status == 200
    assert ledger.queries.running == 0


async def test_it_says_whether_it_is_alive_and_how_far_it_has_read(
    ledger: RunningLedger, http: aiohttp.ClientSession
) -> None:
    await ledger.say(*samples.whole())
    async with http.get("/readyz") as response:
        assert response.status == 200
        answer = await response.json()
    assert answer["ready"] is True
    assert answer["logs"]["EVENTS"] == {"position": 4, "stream_seq": 1, "pending": 0}


async def test_it_is_alive_but_not_ready_while_nats_is_away(
    nats_server: EmbeddedServer, ledger: RunningLedger, http: aiohttp.ClientSession
) -> None:
    await ledger.say(*samples.whole())
    await nats_server.stop()

    async def status(path: str) -> int:
        async with http.get(path) as response:
            return response.status

    async def not_ready() -> bool:
        return await status("/readyz") == 503

    await eventually(not_ready, timeout_s=15)
    assert await status("/healthz") == 200
    assert (await ask(http, "select count(*) from requests"))[1]["rows"] == [[1]]
    await nats_server.start()

    async def ready() -> bool:
        return await status("/readyz") == 200

    await eventually(ready, timeout_s=15)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/sql", (405, "method_not_allowed")),
        ("GET", "/", (404, "not_found")),
        ("POST", "/v1/sqls", (404, "not_found")),
    ],
)
async def test_other_paths_and_methods_have_the_same_shape(
    http: aiohttp.ClientSession, method: str, path: str, expected: tuple[int, str]
) -> None:
    async with http.request(method, path) as response:
        assert await refusal(response) == expected
