"""The outside witness: the ledger of an entrant, asked in SQL, against what the provider generated and the clients verified."""

import time
from collections.abc import Sequence
from urllib.error import URLError

import msgspec

from bench.measure import Measured, WindowError
from bench.peers import PRICE, Ledger, fetch
from bench.provider import Stats
from bench.report import Witness

SETTLE_TIMEOUT_S = 30.0  # the ledger writes behind the requests, by seconds at most
POLL_S = 0.25
PICO_PER_MICRO = 1_000_000

QUERY = """
select count(*) as requests,
       count(*) filter (where stream) as streams,
       coalesce(sum(prompt_tokens), 0) as prompt_tokens,
       coalesce(sum(completion_tokens), 0) as completion_tokens,
       cast(coalesce(sum(cost_usd), 0) as varchar) as cost_usd
from requests
"""


class Column(msgspec.Struct):
    name: str


class Answer(msgspec.Struct):
    """Of POST /v1/sql in the format json."""

    columns: list[Column]
    rows: list[list[object]]


class Sums(msgspec.Struct):
    requests: int
    streams: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: str


def ask(ledger: Ledger, measured: Sequence[Measured]) -> Witness:
    """Wait until the ledger agrees with the provider, or for SETTLE_TIMEOUT_S; then say what each of them counts.

    Raises: WindowError if the ledger gives no answer.
    """
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        try:
            witness = compare(sums(ledger), measured)
        except URLError as error:  # HTTPError is one
            if time.monotonic() > deadline_s:
                raise WindowError(f"the ledger gave no answer ({error})") from error
        else:
            if witness.agrees or time.monotonic() > deadline_s:
                return witness
        time.sleep(POLL_S)


def sums(ledger: Ledger) -> Sums:
    body = msgspec.json.encode({"sql": QUERY, "params": [], "format": "json"})
    said = msgspec.json.decode(fetch(f"{ledger.url}/v1/sql", api_key=ledger.api_key, body=body), type=Answer)
    names = [column.name for column in said.columns]
    return msgspec.convert(dict(zip(names, said.rows[0], strict=True)), Sums, strict=False)


def compare(ledger: Sums, measured: Sequence[Measured]) -> Witness:
    served = Stats()
    for each in measured:
        served.requests += each.served.requests
        served.streams += each.served.streams
        served.prompt_tokens += each.served.prompt_tokens
        served.completion_tokens += each.served.completion_tokens
    return Witness(
        verified=sum(each.window.total for each in measured),
        verified_streams=sum(each.window.total_streams for each in measured),
        served=served,
        ledger={
            "requests": ledger.requests,
            "streams": ledger.streams,
            "prompt_tokens": ledger.prompt_tokens,
            "completion_tokens": ledger.completion_tokens,
        },
        cost_pico=pico(ledger.cost_usd),
        expected_cost_pico=expected_cost_pico(served),
    )


def expected_cost_pico(served: Stats) -> int:
    """Tokens times the price of the route: whole micro-dollars per million tokens make whole pico-dollars per token."""
    return sum(
        tokens * round(PRICE[kind] * PICO_PER_MICRO)
        for kind, tokens in (("input", served.prompt_tokens), ("output", served.completion_tokens))
    )


def pico(dollars: str) -> int:
    """Exact: the ledger's decimal as a whole number of pico-dollars."""
    whole, _, part = dollars.partition(".")
    return int(whole + part[:12].ljust(12, "0"))
