"""The commands of the ingress: the process, and what an operator asks of it."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas.errors import SetupError
from schemas.ids import IngressId, new_name
from schemas.local import home_folder, read_ready
from schemas.routes import with_builtin_routes
from schemas.settings import load

REQUEST_TIMEOUT_S = 30.0


@click.command(
    epilog="Example: PENSTOCK_NATS=nats://127.0.0.1:4222 PENSTOCK_ADMIN_KEY_FILE=/run/secrets/admin penstock ingress --port 8000"
)
@click.option("--nats", "nats_url", envvar="PENSTOCK_NATS", required=True, help="The NATS server or cluster.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="penstock.toml")
@click.option("--host", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on; 0 is any free one.")
@click.option("--fd", type=int, hidden=True, help="An inherited listening socket.")
@click.option("--name", help="What this process's name begins with; the rest is new at each start.")
@click.option("--ready-file", type=click.Path(path_type=Path, dir_okay=False), help="Written once requests are taken.")
def ingress(
    *,
    nats_url: str,
    config: Path | None,
    host: str | None,
    port: int | None,
    fd: int | None,
    name: str | None,
    ready_file: Path | None,
) -> None:
    """Run one ingress: HTTP in, jobs out, tokens back.

    Keys can be given in PENSTOCK_API_KEY and PENSTOCK_ADMIN_KEY, or in files named by the same with _FILE.
    """
    import uvloop  # noqa: PLC0415 - the other commands need none of this

    from ingress.bootstrap import Setup, given_keys  # noqa: PLC0415
    from ingress.process import run_ingress  # noqa: PLC0415
    from schemas.logs import configure  # noqa: PLC0415

    configure("ingress")
    settings = load(config, ingress={"host": host, "port": port})
    setup = Setup(keys=given_keys(os.environ), routes=with_builtin_routes(settings.routes, os.environ))
    uvloop.run(
        run_ingress(
            settings,
            nats_url=nats_url,
            name=IngressId(new_name(name or "ingress")),
            setup=setup,
            fd=fd,
            ready_file=ready_file,
        )
    )


@click.group(epilog="Example: penstock keys create --name laptop --role client")
@click.option("--home", help="The folder of the running `penstock up`.")
@click.pass_context
def keys(context: click.Context, home: str | None) -> None:
    """Create, list, rotate and revoke API keys.

    Talks to the running deployment: that of --home, or the one in PENSTOCK_BASE_URL with the key in PENSTOCK_ADMIN_KEY.
    """
    context.obj = home


@keys.command("create")
@click.option("--name", default="", help="What people will know it by.")
@click.option("--role", type=click.Choice(["client", "analyst", "admin"]), default="client", show_default=True)
@click.option("--org", default="default", show_default=True)
@click.option("--expires-in-s", type=int, help="Seconds until it stops working; never by default.")
@click.option("--model", "models", multiple=True, help="A model that it may ask for; give it for each. All by default.")
@click.option(
    "--route", "routes", multiple=True, help='A route, a provider or "own", where its requests may go. All by default.'
)
@click.option("--max-prompt-price", help="US dollars per million tokens of the prompt that it may cost at most.")
@click.option("--max-completion-price", help="The same of the completion.")
@click.option(
    "--timeout-queue-s", "queue_s", type=float, help="Its requests' time-out from acceptance until a worker begins."
)
@click.option("--timeout-first-token-s", "first_token_s", type=float, help="From there until the first token.")
@click.option("--timeout-idle-s", "idle_s", type=float, help="Between tokens.")
@click.option("--timeout-total-s", "total_s", type=float, help="From acceptance until the last byte.")
@click.pass_obj
def create_key(home: str | None, /, *, models: tuple[str, ...], routes: tuple[str, ...], **given: Any) -> None:
    """Create a key. It is shown this once and never again.

    The time-outs hold for its requests, which may ask for shorter ones.
    """
    price = {"prompt": given.pop("max_prompt_price"), "completion": given.pop("max_completion_price")}
    timeouts = {name: given.pop(name) for name in ("queue_s", "first_token_s", "idle_s", "total_s")}
    body = {
        **given,
        "models": models or None,
        "routes": routes or None,
        "max_price": price if any(price.values()) else None,
        "timeouts": {name: seconds for name, seconds in timeouts.items() if seconds is not None},
    }
    made = call(home, "POST", "/admin/v1/keys", body)
    click.echo(f"{made['id']}  role {made['role']}  org {made['org']}", err=True)
    click.echo(made["key"])


@keys.command("list")
@click.pass_obj
def list_keys(home: str | None) -> None:
    """List the keys."""
    rows = call(home, "GET", "/admin/v1/keys")["data"]
    columns = ["id", "name", "role", "org", "hint", "created", "expires", "revoked", "models", "routes"]
    print_table(columns, [[_cell(row[column]) for column in columns] for row in rows])


def _cell(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value


@keys.command("rotate")
@click.argument("key_id")
@click.option("--grace-s", type=int, default=24 * 3600, show_default=True, help="How long the old one still works.")
@click.pass_obj
def rotate_key(home: str | None, key_id: str, grace_s: int) -> None:
    """Give a key a new secret. The old one works beside it for the grace period."""
    click.echo(call(home, "POST", f"/admin/v1/keys/{key_id}/rotate", {"grace_s": grace_s})["key"])


@keys.command("revoke")
@click.argument("key_id")
@click.pass_obj
def revoke_key(home: str | None, key_id: str) -> None:
    """Stop a key from working, at once and for ever."""
    call(home, "DELETE", f"/admin/v1/keys/{key_id}")
    click.echo(f"{key_id} is revoked.", err=True)


@click.command(epilog="Example: penstock routes")
@click.option("--home", help="The folder of the running `penstock up`.")
def routes(home: str | None) -> None:
    """Show the routes: who serves what, and how many slots are free."""
    rows = call(home, "GET", "/admin/v1/routes")["data"]
    columns = ["route", "provider", "models", "worker", "state", "slots", "free"]
    cells = [
        [
            *(", ".join(row["models"]) if c == "models" else row[c] for c in columns),
            _engine(row["engine"]),
            ", ".join(_key(key) for key in row["keys"]),
            _rates(row["rates"]),
            _health(row["health"]),
            ", ".join(row["left_alone"]),
        ]
        for row in rows
    ]
    print_table([*columns, "engine", "keys", "last minute", "health", "left alone"], cells)


@click.command(epilog="Example: penstock models")
@click.option("--home", help="The folder of the running `penstock up`.")
def models(home: str | None) -> None:
    """List the models that are served now."""
    rows = call(home, "GET", "/v1/models")["data"]
    print_table(["id", "owned_by"], [[row["id"], row["owned_by"]] for row in rows])


def _engine(stats: dict[str, Any] | None) -> str | None:
    """What a model server says of itself, in a few words."""
    if stats is None:
        return None
    told = [f"{stats['running']} running", f"{stats['waiting']} waiting"]
    if stats["cache_used"] is not None:
        told.append(f"cache {stats['cache_used']:.0%} full")
    if stats["prefix_asked"] and stats["prefix_found"] is not None:
        told.append(f"{stats['prefix_found'] / stats['prefix_asked']:.0%} of prompts from cache")
    return ", ".join(told)


def _key(key: dict[str, Any]) -> str:
    """``env:A ready``, ``env:B cooling for 12 s``, ``file:/run/c dead: refused (HTTP 401)``."""
    told = f"{key['label']} {key['state']}"
    if key["state"] == "cooling":
        told += f" for {key['for_s']:.0f} s"
    elif key["state"] == "dead":
        told += f": {key['reason']}"
    left = [f"{key[f'{of}_left']} {of}" for of in ("requests", "tokens") if key[f"{of}_left"] is not None]
    return f"{told} ({' and '.join(left)} left)" if left else told


def _rates(rates: dict[str, Any] | None) -> str | None:
    """``12 of 60 requests, 900 tokens``."""
    if rates is None:
        return None
    told = []
    for of in ("requests", "tokens"):
        limit = rates[f"{of}_per_minute"]
        told.append(f"{rates[of]} of {limit} {of}" if limit else f"{rates[of]} {of}")
    return ", ".join(told)


def _health(health: dict[str, Any] | None) -> str | None:
    """``2% errors, 340 ms to the first token``."""
    if health is None:
        return None
    first_ms = health["first_token_ms"]
    return f"{health['error_rate']:.0%} errors" + ("" if first_ms is None else f", {first_ms} ms to the first token")


def call(home: str | None, method: str, path: str, body: object = None) -> Any:
    """Asks the running ingress. Raises: SetupError with what it answered, or why there was no answer."""
    base_url, key = _deployment(home)
    request = urllib.request.Request(  # noqa: S310 - the operator's own address
        base_url.removesuffix("/v1") + path,
        data=None if body is None else msgspec.json.encode(body),
        method=method,
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:  # noqa: S310
            return msgspec.json.decode(response.read())
    except urllib.error.HTTPError as error:
        told = msgspec.json.decode(error.read())["error"]["message"]
        raise SetupError(f"{method} {path}: {told}") from error
    except OSError as error:
        raise SetupError(f"{base_url} gives no answer: {error}. Is `penstock up` running?") from error


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """A table on a terminal, tab-separated lines otherwise."""
    from rich.console import Console  # noqa: PLC0415 - costs 50 ms
    from rich.table import Table  # noqa: PLC0415

    console = Console()
    if not console.is_terminal:
        for row in [columns, *rows]:
            click.echo("\t".join("" if cell is None else str(cell) for cell in row))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(table)


def _deployment(home: str | None) -> tuple[str, str]:
    base_url, key = os.environ.get("PENSTOCK_BASE_URL"), os.environ.get("PENSTOCK_ADMIN_KEY")
    if base_url and key and home is None:
        return base_url, key
    ready = read_ready(home_folder(home))
    return ready.base_url, ready.admin_key
