"""Routes as they are served: what their settings leave out, known providers and the machine itself say.

Its address, its keys, its prices, and whether it is one of ours; and which routes there are where nobody stated any.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from schemas.errors import SetupError
from schemas.ids import RouteId
from schemas.money import FREE, UNKNOWN
from schemas.providers import KnownProvider, known_at, known_price, known_providers, same_address
from schemas.settings import OWN, ModelSettings, RouteSettings

ECHO = RouteSettings(id=RouteId("echo"), provider="echo")


def with_builtin_routes(routes: tuple[RouteSettings, ...], environ: Mapping[str, str]) -> tuple[RouteSettings, ...]:
    """*routes*, completed, and the model ``echo``; where nothing is configured, also the providers whose keys are in *environ*.

    ``OPENAI_BASE_URL``, which OpenAI's own SDK reads, moves that provider elsewhere.
    """
    found = [completed(route, environ) for route in (routes or _with_keys(environ))]
    if not any(route.id == ECHO.id for route in found):
        found.append(ECHO)
    return tuple(found)


def completed(route: RouteSettings, environ: Mapping[str, str]) -> RouteSettings:
    """*route* with what it leaves out: address, key and prices of a known provider. What it says itself stays.

    A key from the environment goes to the provider's own address and nowhere else.
    """
    known = known_provider(route)
    base_url, api_keys = route.base_url, route.api_keys
    if known is not None:
        at_home = base_url is None or known.base_url is None or same_address(base_url, known.base_url)
        if at_home and not api_keys and known.key_env:
            api_keys = (f"env:{_set_one(known.key_env, environ)}",)
        base_url = base_url or known.base_url
    models = tuple(priced(route, model) for model in route.models)
    return msgspec.structs.replace(route, base_url=base_url, api_keys=api_keys, models=models)


def known_provider(route: RouteSettings) -> KnownProvider | None:
    """The entry of the table that *route* means, by its provider's name, or for ``openai`` by its address."""
    if route.provider == "openai" and route.base_url is not None:
        return known_at(route.base_url)
    return known_providers().get(route.provider)


def priced(route: RouteSettings, model: ModelSettings) -> ModelSettings:
    """*model* with its price on *route*: as configured, else as the table of providers has it, else nothing if it runs here."""
    if model.price is not None:
        return model
    known = known_provider(route)
    if known is not None:  # also behind a proxy on this machine
        price = known_price(known, model.upstream_name) or UNKNOWN
    else:
        price = FREE if route.provider in OWN or _is_here(route.base_url) else UNKNOWN
    return msgspec.structs.replace(model, price=price)


def _with_keys(environ: Mapping[str, str]) -> tuple[RouteSettings, ...]:
    """A route for each known provider whose key is in *environ*; of those that need a library, the compatible API."""
    return tuple(
        RouteSettings(
            id=RouteId(name),
            provider=name,
            base_url=(environ.get(known.base_url_env) if known.base_url_env else None) or known.base_url,
            api_keys=(f"env:{_set_one(known.key_env, environ)}",),
        )
        for name, known in known_providers().items()
        if known.wire == "openai" and known.base_url and any(environ.get(variable) for variable in known.key_env)
    )


def _set_one(variables: tuple[str, ...], environ: Mapping[str, str]) -> str:
    return next((variable for variable in variables if environ.get(variable)), variables[0])


def _is_here(base_url: str | None) -> bool:
    """Whether that is a server on this machine."""
    try:
        host = urlsplit(base_url or "").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def shared(route: RouteSettings, workers: int) -> RouteSettings:
    """*route* with one worker's part of its limits, where so many have the same keys: together they take no more than it states.

    Attempts at once are at least one for each. What only runs here, such as a worker's own engine, isn't shared.
    Raises: SetupError if there is less than one request or token for each.
    """
    if workers == 1 or route.provider in OWN:
        return route
    for name, limit in (("requests", route.requests_per_minute), ("tokens", route.tokens_per_minute)):
        if 0 < limit < workers:
            raise SetupError(
                f"route {route.id!r}: {name}_per_minute = {limit} can't be shared by {workers} workers; run fewer of them"
            )
    at_once = route.max_concurrency
    return msgspec.structs.replace(
        route,
        max_concurrency=None if at_once is None else max(1, at_once // workers),
        requests_per_minute=route.requests_per_minute // workers,
        tokens_per_minute=route.tokens_per_minute // workers,
    )


def is_own(route: RouteSettings) -> bool:
    """Whether *route* runs on the deployment's machines, or is somebody else's."""
    return (route.provider in OWN or _is_here(route.base_url)) if route.own is None else route.own
