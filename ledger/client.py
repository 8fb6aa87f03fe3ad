"""The command line's way to a running ledger: where it is, with which key, and what it answers."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from schemas.errors import SetupError
from schemas.local import home_folder, read_ready

ANSWER_WAIT_S = 600.0  # the ledger has its own, shorter limit and says so
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Ledger(NamedTuple):
    """A running ledger and a key that may read it."""

    url: str
    key: str


class Answer(NamedTuple):
    body: bytes
    truncated: bool


class Column(msgspec.Struct, frozen=True):
    name: str
    type: str


class Table(msgspec.Struct, frozen=True):
    """The ledger's answer in JSON. A JSON column's cells keep their text."""

    columns: list[Column]
    rows: list[list[Any]]
    row_count: int
    truncated: bool


_table = msgspec.json.Decoder(Table).decode


def find_ledger(home: str | None, ledger_url: str | None, environ: Mapping[str, str] | None = None) -> Ledger:
    """The ledger at *ledger_url* or PENSTOCK_LEDGER_URL with PENSTOCK_API_KEY, else the one that runs in *home*.

    Raises: SetupError that says what is missing.
    """
    environ = os.environ if environ is None else environ
    url = ledger_url or (environ.get("PENSTOCK_LEDGER_URL") if home is None else None)
    if not url:
        ready = read_ready(home_folder(home, environ))
        return Ledger(ready.ledger_url.rstrip("/"), ready.admin_key)
    key = environ.get("PENSTOCK_API_KEY") or environ.get("PENSTOCK_ADMIN_KEY")
    if not key:
        raise SetupError(f"set PENSTOCK_API_KEY to a key of role analyst or admin to ask the ledger at {url}")
    return Ledger(url.rstrip("/"), key)


def ask(ledger: Ledger, sql: str, *, params: Sequence[Any] = (), format_: str = "json") -> Answer:
    """What *ledger* answers to *sql*.

    Raises: SetupError with the ledger's message if it refuses, or says that nobody is there.
    """
    request = urllib.request.Request(  # noqa: S310 - the operator's own address
        f"{ledger.url}/v1/sql",
        data=msgspec.json.encode({"sql": sql, "params": list(params), "format": format_}),
        headers={"authorization": f"Bearer {ledger.key}", "content-type": "application/json"},
    )
    try:
        with NO_PROXY.open(request, timeout=ANSWER_WAIT_S) as response:
            return Answer(response.read(), response.headers.get("x-penstock-truncated") == "true")
    except urllib.error.HTTPError as error:
        raise SetupError(_message_in(error.read()) or f"the ledger answered {error.code}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise SetupError(f"there is no ledger at {ledger.url}: {reason}. `penstock up` starts one.") from error


def table_of(answer: Answer) -> Table:
    """Raises: SetupError if it isn't what a ledger sends."""
    try:
        return _table(answer.body)
    except msgspec.MsgspecError as error:
        raise SetupError(f"that is no ledger: its answer can't be read ({error})") from error


def _message_in(body: bytes) -> str | None:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.MsgspecError, LookupError, TypeError):
        return None
