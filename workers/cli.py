"""The command of the workers: the process."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import click

from schemas.errors import SetupError
from schemas.ids import RouteId, WorkerId, new_name
from schemas.local import nats_url
from schemas.routes import shared, with_builtin_routes
from schemas.settings import ModelSettings, RouteSettings, VllmSettings, discovers, load


@click.command(
    epilog="Examples: penstock worker --model Qwen/Qwen3-0.6B beside `penstock up`; for a cluster, "
    "PENSTOCK_NATS=nats://127.0.0.1:4222 penstock worker --config penstock.toml --route openai"
)
@click.option(
    "--nats",
    "nats_given",
    envvar="PENSTOCK_NATS",
    help="The NATS server or cluster. Default: that of the `penstock up` on this machine.",
)
@click.option(
    "--home", help="Where that one keeps everything. Default: PENSTOCK_HOME, else this system's place for data."
)
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="penstock.toml")
@click.option("--route", "only", multiple=True, help="Serve this route alone; may be given again. Default: all.")
@click.option("--name", help="This worker's name; one word, new at each start by default.")
@click.option("--ready-file", type=click.Path(path_type=Path, dir_okay=False), help="Written once jobs are taken.")
@click.option(
    "--model", help="Serve this model (a Hugging Face name or a folder) with a vLLM of its own, and nothing else."
)
@click.option(
    "--vllm-arg", "vllm_args", multiple=True, help="A flag for `vllm serve`, such as --vllm-arg=--max-model-len=8192."
)
@click.option(
    "--discover/--no-discover",
    default=None,
    help="Look for model servers on this machine. Default: as configured, else where no route is.",
)
@click.option(
    "--slots",
    type=click.IntRange(1, 4096),
    help="With --model: answers at once. Default: what the engine has room for.",
)
def worker(
    *,
    nats_given: str | None,
    home: str | None,
    config: Path | None,
    only: tuple[str, ...],
    name: str | None,
    ready_file: Path | None,
    model: str | None,
    vllm_args: tuple[str, ...],
    slots: int | None,
    discover: bool | None,
) -> None:
    """Run one worker: jobs in, tokens and receipts out.

    SIGTERM drains it: no new jobs, what runs may finish, the rest is handed back.
    """
    import uvloop  # noqa: PLC0415 - `--help` needs none of this

    from schemas.logs import configure  # noqa: PLC0415
    from workers.process import run_worker  # noqa: PLC0415

    configure("worker")
    settings = load(config)
    routes = with_builtin_routes(settings.routes, os.environ)
    if model is not None:
        routes = (vllm_route(model, args=vllm_args, slots=slots),)
    elif only:
        unknown = set(only) - {route.id for route in routes}
        if unknown:
            raise SetupError(
                f"no route is called {', '.join(sorted(unknown))}; there are {', '.join(r.id for r in routes)}"
            )
        routes = tuple(route for route in routes if route.id in only)
    routes = tuple(shared(route, settings.worker.limits_shared_by) for route in routes)
    uvloop.run(
        run_worker(
            settings,
            routes,
            nats_url=nats_url(nats_given, home or settings.home),
            name=WorkerId(name or new_name("worker")),
            ready_file=ready_file,
            version=importlib.metadata.version("penstock"),
            discover=discovers(settings) and model is None and not only if discover is None else discover,
        )
    )


def vllm_route(model: str, *, args: tuple[str, ...], slots: int | None) -> RouteSettings:
    """The route of a machine that serves *model* with its own vLLM. A folder goes by its last part."""
    public = Path(model).name if Path(model).is_dir() else model
    return RouteSettings(
        id=RouteId(public),
        provider="vllm",
        max_concurrency=slots,
        models=(ModelSettings(name=public),),
        vllm=VllmSettings(model=model, args=args),
    )
