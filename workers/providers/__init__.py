"""The providers that are known, by the name that a route's ``provider`` has."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from schemas.errors import SetupError
from schemas.providers import NO_HEADERS, RATE_LIMITS, KnownProvider, known_providers
from schemas.routes import completed, known_provider
from schemas.settings import OWN, RouteSettings, WorkerSettings
from workers.providers.accounts import Accounts, Rules
from workers.providers.base import Provider
from workers.providers.echo import Echo
from workers.providers.known import Known
from workers.providers.openai import OpenAI
from workers.providers.vllm import Vllm

_OWN: dict[str, Callable[[RouteSettings, WorkerSettings], Provider]] = {
    "echo": lambda route, _: Echo.from_route(route),
    "openai": OpenAI.from_route,
    "vllm": Vllm.from_route,
}


def make_provider(route: RouteSettings, settings: WorkerSettings, *, rules: Rules | None = None) -> Provider:
    """The provider that *route* describes, with all of its keys; *rules* say how patient it is.

    It opens no connection before its first job.
    Raises: SetupError if the route can't work as it is written.
    """
    settings = _patient(settings, route)
    if route.provider in OWN:
        return _with_one_key(route, settings)
    known = known_provider(route)
    headers = NO_HEADERS if known is None else known.rate_limit_headers
    return Accounts(
        route if known is None else completed(route, os.environ),
        lambda single: _with_one_key(single, settings),
        settings=settings,
        headers=RATE_LIMITS["openai"] if headers == NO_HEADERS else headers,  # the names that most have, if any
        rules=rules,
    )


def _with_one_key(route: RouteSettings, settings: WorkerSettings) -> Provider:
    """Raises: SetupError."""
    known = known_provider(route)
    if known is not None:
        return Known.of(known, route, settings) if known.wire == "openai" else _own_wire(known, route, settings)
    make = _OWN.get(route.provider)
    if make is None:
        names = ", ".join(sorted({*_OWN, *known_providers()}))
        raise SetupError(f"route {route.id!r}: unknown provider {route.provider!r}; known are: {names}")
    return make(route, settings)


def _patient(settings: WorkerSettings, route: RouteSettings) -> WorkerSettings:
    """*settings* with at least the patience that *route* states: the ingress keeps the time, too, and to the millisecond."""
    return msgspec.structs.replace(
        settings,
        first_byte_timeout_s=max(settings.first_byte_timeout_s, route.timeouts.first_token_s or 0.0),
        idle_timeout_s=max(settings.idle_timeout_s, route.timeouts.idle_s or 0.0),
    )


def _own_wire(known: KnownProvider, route: RouteSettings, settings: WorkerSettings) -> Provider:
    """Raises: SetupError if the libraries for it aren't installed."""
    try:
        from workers.providers.any_llm import OwnWire  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError as error:
        raise SetupError(
            f"route {route.id!r}: {known.title}, needs a library: pip install 'penstock[wires]'. "
            f'Without it there is the provider "{route.provider}-compatible".'
        ) from error
    return OwnWire.of(known, route, settings)
