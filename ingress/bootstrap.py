"""What an ingress states in CONTROL when it starts: the default org, the keys it was given, the routes of its configuration.

Statements are made only where CONTROL says something else, so that a restart states nothing, and with the sequence number
they are based on, so that ingresses that start together don't undo each other.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

import structlog

from bus.control import ControlFeed
from ingress.auth import hash_key, hint_of
from schemas.admin import DEFAULT_ORG
from schemas.control import ControlEvent, KeyStated, OrgStated, PublicModel, Role, RouteStated
from schemas.errors import Conflict
from schemas.ids import EventId, KeyId, RouteId, new_id
from schemas.settings import RouteSettings, secret

log = structlog.get_logger()

BY_SETUP = "setup"
CONFLICTS_MAX = 10
ENVELOPE = frozenset(ControlEvent.__struct_fields__)
GIVEN_KEYS = (("PENSTOCK_ADMIN_KEY", Role.ADMIN), ("PENSTOCK_API_KEY", Role.CLIENT))


@dataclass(frozen=True, slots=True)
class Setup:
    """What the operator gave this process."""

    keys: tuple[tuple[str, Role], ...]
    routes: tuple[RouteSettings, ...]


def given_keys(environ: Mapping[str, str]) -> tuple[tuple[str, Role], ...]:
    """Keys from ``PENSTOCK_ADMIN_KEY``, ``PENSTOCK_API_KEY``, or from the files that ``…_FILE`` names.

    Raises: SetupError if such a file can't be read.
    """
    found: list[tuple[str, Role]] = []
    for name, role in GIVEN_KEYS:
        if environ.get(name):
            found.append((environ[name], role))
        elif environ.get(f"{name}_FILE"):
            found.append((secret(f"file:{environ[f'{name}_FILE']}"), role))
    return tuple(found)


async def state_setup(control: ControlFeed, setup: Setup, *, producer: str) -> None:
    """Brings CONTROL to what *setup* says. Raises: LogUnavailable."""
    await _until_said(partial(_state_org, control, producer))
    for key, role in setup.keys:
        await _until_said(partial(_state_key, control, key, role, producer))
    for rank, route in enumerate(setup.routes):
        await _until_said(partial(_state_route, control, route, rank, producer))


async def _until_said(say: Callable[[], Awaitable[None]]) -> None:
    for _ in range(CONFLICTS_MAX):
        try:
            await say()
        except Conflict:
            log.info("statement_repeated", reason="somebody else stated the same entity")
        else:
            return
    raise Conflict


async def _state_org(control: ControlFeed, producer: str) -> None:
    if DEFAULT_ORG not in control.state.orgs:
        await control.say(
            OrgStated(
                id=EventId(new_id()),
                ts_ns=time.time_ns(),
                by=BY_SETUP,
                producer=producer,
                org=DEFAULT_ORG,
                name="Default",
            )
        )


async def _state_key(control: ControlFeed, key: str, role: Role, producer: str) -> None:
    hash_ = hash_key(key)
    key_id = KeyId(f"key_{hash_[:16]}")  # the same key given to several ingresses is one key
    if key_id in control.state.keys:
        return  # also when it was revoked or rotated since: a restart must not undo that
    await control.say(
        KeyStated(
            id=EventId(new_id()),
            ts_ns=time.time_ns(),
            by=BY_SETUP,
            producer=producer,
            key_id=key_id,
            org=DEFAULT_ORG,
            role=role,
            name=f"{role.value} key of the setup",
            hash=hash_,
            hint=hint_of(key),
            created_ns=time.time_ns(),
        )
    )


async def _state_route(control: ControlFeed, route: RouteSettings, rank: int, producer: str) -> None:
    models = tuple(PublicModel(name=model.name, price=model.charged) for model in route.models)
    before = control.state.routes.get(RouteId(route.id))
    said = RouteStated(
        id=EventId(new_id()),
        ts_ns=time.time_ns(),
        by=BY_SETUP,
        producer=producer,
        route=route.id,
        provider=route.provider,
        models=models,
        rank=rank,
        weight=route.weight,
        timeouts=route.timeouts,
        tokens_per_minute=route.tokens_per_minute,
        created_ns=time.time_ns() if before is None else before.created_ns,
    )
    if before is None or _facts(before) != _facts(said):
        await control.say(said)


def _facts(route: RouteStated) -> dict[str, object]:
    """What is stated, without the envelope."""
    return {name: getattr(route, name) for name in route.__struct_fields__ if name not in ENVELOPE}
