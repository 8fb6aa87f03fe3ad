"""The command line: mounts the commands of the three services; `up` composes them on one machine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click
import msgspec

from schemas.errors import PenstockError, SetupError
from schemas.local import READY_FILE, Ready, home_folder, write_private, write_ready
from schemas.routes import shared, with_builtin_routes
from schemas.settings import Settings, load

COMMANDS = {
    "ingress": "ingress.cli:ingress",
    "worker": "workers.cli:worker",
    "ledger": "ledger.cli:ledger",
    "keys": "ingress.cli:keys",
    "routes": "ingress.cli:routes",
    "models": "ingress.cli:models",
    "sql": "ledger.cli:sql",
    "explain": "ledger.cli:explain",
}
FIRST_MODEL_WAIT_S = 10.0
KEY_BYTES = 32
LISTEN_BACKLOG = 2048
MODELS_SHOWN_MAX = 6  # of a route, in the greeting


class Lazy(click.Group):
    """Imports a command when it is called: `penstock keys` must not wait for DuckDB."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = COMMANDS.get(cmd_name)
        if place is None:
            return super().get_command(ctx, cmd_name)
        module, _, name = place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=Lazy, epilog="Begin with: penstock up")
@click.version_option(package_name="penstock")
def cli() -> None:
    """The GPUs you own and the providers you rent, as one OpenAI-compatible API with a ledger you can query."""


@cli.command(epilog="Example: penstock up --config penstock.toml --port 8000")
@click.option("--home", help="Where everything is kept. Default: PENSTOCK_HOME, else this system's place for data.")
@click.option("--port", type=click.IntRange(0, 65535), help="The API's port; 0 is any free one. Default: 8000.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="penstock.toml")
@click.option("--nats", "nats_url", envvar="PENSTOCK_NATS", help="Use this NATS instead of an embedded one.")
@click.option(
    "--ready-file", type=click.Path(path_type=Path, dir_okay=False), help="Gets the addresses and keys as JSON."
)
def up(
    *, home: str | None, port: int | None, config: Path | None, nats_url: str | None, ready_file: Path | None
) -> None:
    """Run everything on this machine: NATS, ingress, ledger and workers, each a process of its own.

    Needs nothing preinstalled. With no configuration it serves the model servers of this machine (Ollama, LM Studio,
    llama.cpp, vLLM), the providers whose keys are in the environment (OPENAI_API_KEY, …) and always the built-in
    model `echo`. Ctrl-C or SIGTERM stops it in order and loses nothing.
    """
    from schemas.logs import configure  # noqa: PLC0415

    configure("up")
    settings = load(config, ingress={"port": port})
    for route in settings.routes:
        shared(route, _sharing(settings))  # what is wrong with that is said here, and not by each worker
    place = home_folder(home or os.environ.get("PENSTOCK_HOME") or settings.home)
    asyncio.run(_up(settings, place, config=config, nats_url=nats_url, ready_file=ready_file))


async def _up(
    settings: Settings, home: Path, *, config: Path | None, nats_url: str | None, ready_file: Path | None
) -> None:
    from bus.processes import Child, Supervisor  # noqa: PLC0415 - `penstock --help` needs none of this
    from bus.server import EmbeddedServer  # noqa: PLC0415
    from schemas.logs import losing  # noqa: PLC0415

    began = time.monotonic()
    keys = _own_keys(home)
    api, ledger = (
        _listen(settings.ingress.host, settings.ingress.port),
        _listen(settings.ledger.host, settings.ledger.port),
    )
    server = None
    if nats_url is None:
        server = EmbeddedServer(home / "nats", settings=settings.nats)
        await server.start()
        nats_url = server.url
    children = [
        Child(c) for c in _commands(settings, home, config=config, nats_url=nats_url, keys=keys, api=api, ledger=ledger)
    ]

    def describe() -> Ready:
        pids = {child.command.role: child.pid for child in children if child.pid is not None}
        if server is not None:
            pids["nats"] = server.pid
        return Ready(
            base_url=f"http://{_address(api)}/v1",
            api_key=keys["api_key"],
            admin_key=keys["admin_key"],
            ledger_url=f"http://{_address(ledger)}",
            nats_url=nats_url,
            home=str(home),
            pids={"up": os.getpid(), **pids},
        )

    def tell() -> None:
        for path in (home / READY_FILE, ready_file):
            if path is not None:
                write_ready(path, describe())

    supervisor = Supervisor(children, server, on_change=tell)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: supervisor.kill() if stop.is_set() else stop.set())
    watcher: asyncio.Task[None] | None = None
    try:
        for child in children:
            child.start()
        await supervisor.wait_ready()
        await _first_model(describe().base_url)
        tell()
        watcher = asyncio.create_task(supervisor.watch())
        served = await asyncio.to_thread(_served, describe())
        with losing(sys.stdout):
            _greet(describe(), settings, served, seconds=time.monotonic() - began)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([stopped, watcher], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        with losing(sys.stderr):
            click.echo("Stopping: what runs may finish. Again to stop at once.", err=True)
        await supervisor.stop()
        for path in (home / READY_FILE, ready_file):
            if path is not None:
                path.unlink(missing_ok=True)


def _commands(
    settings: Settings,
    home: Path,
    *,
    config: Path | None,
    nats_url: str,
    keys: dict[str, str],
    api: socket.socket,
    ledger: socket.socket,
) -> list[Any]:
    """What each role runs, in the order in which they are stopped: first who takes requests, last who records them."""
    from bus.processes import Command  # noqa: PLC0415

    run = home / "run"
    run.mkdir(exist_ok=True, mode=0o700)
    configured = ("--config", str(config.absolute())) if config is not None else ()
    environ = {"PENSTOCK_NATS": nats_url, "PENSTOCK_HOME": str(home), "PYTHONPATH": _python_path()}
    given = {"PENSTOCK_API_KEY": keys["api_key"], "PENSTOCK_ADMIN_KEY": keys["admin_key"]}

    def command(role: str, *arguments: str, **more: Any) -> Command:
        ready_file = run / f"{role}.json"
        told = ("--ready-file", str(ready_file))
        return Command(
            role=role,
            arguments=(*arguments, *configured, *told),
            ready_file=ready_file,
            environ={**environ, **more.pop("environ", {})},
            **more,
        )

    ingresses = ["ingress"] + [f"ingress-{number}" for number in range(2, settings.up.ingresses + 1)]
    workers = ["worker"] + [f"worker-{number}" for number in range(2, settings.up.workers + 1)]
    return [
        *(
            command(
                role,
                *("ingress", "--fd", str(api.fileno())),
                environ=given,
                pass_fds=(api.fileno(),),
                stop_wait_s=settings.ingress.stop_wait_s,
            )
            for role in ingresses
        ),
        *(
            # One of them looks for the machine's model servers: they are there once.
            command(
                role,
                "worker",
                *(() if role == "worker" else ("--no-discover",)),
                environ={
                    "PENSTOCK_WORKER_RUN_FOLDER": str(run / role),
                    "PENSTOCK_WORKER_LIMITS_SHARED_BY": str(_sharing(settings)),
                },
                stop_wait_s=settings.worker.stop_wait_s,
            )
            for role in workers
        ),
        command("ledger", "ledger", "--fd", str(ledger.fileno()), pass_fds=(ledger.fileno(),)),
    ]


def _sharing(settings: Settings) -> int:
    """How many workers have the same keys, here and on the machines that the configuration tells of."""
    return settings.up.workers * settings.worker.limits_shared_by


def _own_keys(home: Path) -> dict[str, str]:
    """The keys of this home's owner: those of the environment, else made on first use and kept in a private file."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = home / "keys.json"
    if path.exists():
        kept: dict[str, str] = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    else:
        kept = {name: f"sk-penstock-{secrets.token_urlsafe(KEY_BYTES)}" for name in ("api_key", "admin_key")}
        write_private(path, msgspec.json.encode(kept))
    given = {"api_key": os.environ.get("PENSTOCK_API_KEY"), "admin_key": os.environ.get("PENSTOCK_ADMIN_KEY")}
    return {**kept, **{name: key for name, key in given.items() if key}}


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket that outlives its process: while a role is restarted, clients wait in its backlog.

    Raises: SetupError if the address is taken.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        raise SetupError(
            f"{host}:{port} can't be listened on: {error.strerror}. Choose another with --port."
        ) from error
    return sock


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"{shown}:{port}"


async def _first_model(base_url: str) -> None:
    """Returns when the ingress has heard of a model, so that the first request after the greeting can't be too early."""
    until = time.monotonic() + FIRST_MODEL_WAIT_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError, urllib.error.URLError):
            body = await asyncio.to_thread(_read, base_url.removesuffix("/v1") + "/readyz")
            if msgspec.json.decode(body)["models"] > 0:
                return
        await asyncio.sleep(0.02)
    raise SetupError("the ingress has heard of no model; the workers' reason is above")


def _read(url: str | urllib.request.Request) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - our own address
        content: bytes = response.read()
        return content


def _served(ready: Ready) -> list[tuple[str, str, list[str]]]:
    """What is served now: each route, its state and its models; those that are more than `echo` first."""
    request = urllib.request.Request(  # noqa: S310 - our own address
        ready.base_url.removesuffix("/v1") + "/admin/v1/routes", headers={"Authorization": f"Bearer {ready.admin_key}"}
    )
    try:
        rows = msgspec.json.decode(_read(request))["data"]
    except OSError:  # the greeting does without
        return []
    found = {row["route"]: (row["route"], row["state"], row["models"]) for row in rows if row["worker"] is not None}
    return sorted(found.values(), key=lambda row: row[0] == "echo")


def _told(route: str, state: str, models: list[str]) -> str:
    more = f" and {len(models) - MODELS_SHOWN_MAX} more" if len(models) > MODELS_SHOWN_MAX else ""
    names = ", ".join(models[:MODELS_SHOWN_MAX]) + more
    return f"{route}: {names}" if state == "serving" else f"{route}: {state}"


def _greet(ready: Ready, settings: Settings, served: list[tuple[str, str, list[str]]], *, seconds: float) -> None:
    models = [model.name for route in with_builtin_routes(settings.routes, os.environ) for model in route.models]
    models += [name for _, state, names in served if state == "serving" for name in names]
    model = models[0] if models else "echo"
    serving = "\n             ".join(_told(*row) for row in served)
    body = msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": "Hello"}]}).decode()
    click.echo(
        f"""\
Penstock is up ({seconds:.1f} s).

  base URL   {ready.base_url}
  API key    {ready.api_key}
  ledger     {ready.ledger_url}
  home       {ready.home}
  serving    {serving}

Try it:

  curl {ready.base_url}/chat/completions -H 'Authorization: Bearer {ready.api_key}' \\
    -H 'Content-Type: application/json' -d '{body}'

Then ask the ledger (in another terminal):

  {_called("sql", ready)} "select model, status, completion_tokens, cost_usd from requests"
"""
    )


def _called(command: str, ready: Ready) -> str:
    """How the one who reads the greeting can call *command*: `make up` puts nothing on the PATH."""
    program = "penstock" if shutil.which("penstock") else os.path.relpath(Path(sys.executable).with_name("penstock"))
    home = "" if Path(ready.home) == home_folder(None) else f" --home {shlex.quote(ready.home)}"
    return f"{program} {command}{home}"


def _python_path() -> str:
    """Where this program was imported from, for the children: they run with -P, wherever the user stands."""
    here = str(Path(__file__).parent)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def main() -> None:
    """The entry point: errors that a person can mend are told in a line, without a traceback."""
    try:
        cli()
    except PenstockError as error:
        click.echo(f"penstock: {error.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
