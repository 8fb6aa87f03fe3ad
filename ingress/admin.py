"""/admin/v1: commands that become control events."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from bus.control import ControlFeed
from ingress.auth import authenticate, hash_key, hint_of, new_key, require
from ingress.fleet import Fleet
from ingress.router import Router
from schemas.admin import CreateKey, RotateKey
from schemas.control import KeyStated, Role
from schemas.errors import BadRequest, BodyTooLarge, NotFound, RequestTimeout
from schemas.ids import EventId, KeyId, new_id
from schemas.jobs import Presence, RouteOffer
from schemas.money import MICRO_PER_DOLLAR, NO_CAP, PriceCap
from schemas.refusals import refusal

T = TypeVar("T", bound=Struct)

BODY_MAX_BYTES = 64 * 1024
BODY_TIMEOUT_S = 10.0
SECOND_NS = 1_000_000_000


class Admin:
    """The endpoints; each needs a key with the role admin."""

    def __init__(self, control: ControlFeed, fleet: Fleet, router: Router, *, producer: str) -> None:
        self._control = control
        self._fleet = fleet
        self._router = router
        self._producer = producer

    async def create_key(self, request: Request) -> Response:
        by = self._admin(request)
        wanted = await _body(request, CreateKey)
        if wanted.org not in self._control.state.orgs:
            raise BadRequest(f"There is no org '{wanted.org}'.", param="org")
        key, now_ns = new_key(), time.time_ns()
        stated = KeyStated(
            id=EventId(new_id()),
            ts_ns=now_ns,
            by=by,
            producer=self._producer,
            key_id=KeyId(f"key_{hash_key(key)[:16]}"),
            org=wanted.org,
            role=wanted.role,
            name=wanted.name,
            hash=hash_key(key),
            hint=hint_of(key),
            created_ns=now_ns,
            expires_ns=None if wanted.expires_in_s is None else now_ns + wanted.expires_in_s * SECOND_NS,
            timeouts=wanted.timeouts.stated(),
            models=wanted.models,
            routes=wanted.routes,
            max_price=NO_CAP if wanted.max_price is None else wanted.max_price.cap(),
        )
        await self._control.say(stated)
        return _json({**shown(stated), "key": key}, status=201)

    async def list_keys(self, request: Request) -> Response:
        self._admin(request)
        keys = sorted(self._control.state.keys.values(), key=lambda key: (key.created_ns, key.key_id))
        return _json({"object": "list", "data": [shown(key) for key in keys]})

    async def rotate_key(self, request: Request) -> Response:
        by = self._admin(request)
        wanted = await _body(request, RotateKey)
        old = self._key(request)
        if old.revoked:
            raise BadRequest("This key is revoked; create a new one.")
        key, now_ns = new_key(), time.time_ns()
        stated = msgspec.structs.replace(
            old,
            id=EventId(new_id()),
            ts_ns=now_ns,
            by=by,
            producer=self._producer,
            hash=hash_key(key),
            hint=hint_of(key),
            previous_hash=old.hash,
            previous_until_ns=now_ns + wanted.grace_s * SECOND_NS,
        )
        await self._control.say(stated)
        return _json({**shown(stated), "key": key})

    async def revoke_key(self, request: Request) -> Response:
        by = self._admin(request)
        stated = msgspec.structs.replace(
            self._key(request),
            id=EventId(new_id()),
            ts_ns=time.time_ns(),
            by=by,
            producer=self._producer,
            revoked=True,
        )
        await self._control.say(stated)
        return _json(shown(stated))

    async def list_routes(self, request: Request) -> Response:
        """What each worker serves now, and what the operator stated."""
        self._admin(request)
        live: list[dict[str, Any]] = [
            {
                "route": offer.route,
                "provider": offer.provider,
                "models": [model.name for model in offer.models],
                "worker": presence.worker,
                "state": _state(presence, offer),
                "slots": offer.slots,
                "free": offer.free,
                "engine": None if offer.engine is None else msgspec.structs.asdict(offer.engine),
                "keys": offer.standing.keys,
                "rates": offer.standing.rates,
                "health": offer.standing.health,
                "left_alone": self._router.left_alone(offer.route, [model.name for model in offer.models]),
            }
            for presence in self._fleet.workers()
            for offer in presence.routes
        ]
        served = {row["route"] for row in live}
        dead: list[dict[str, Any]] = [
            {
                "route": route.route,
                "provider": route.provider,
                "models": [model.name for model in route.models],
                "worker": None,
                "state": "no worker",
                "slots": 0,
                "free": 0,
                "engine": None,
                "keys": (),
                "rates": None,
                "health": None,
                "left_alone": (),
            }
            for route in self._control.state.routes.values()
            if route.route not in served and not route.removed
        ]
        rows: list[dict[str, Any]] = sorted(live + dead, key=_by_route)
        return _json({"object": "list", "data": rows})

    def _admin(self, request: Request) -> KeyId:
        principal = authenticate(request.scope["headers"], self._control.state, now_ns=time.time_ns())
        require(principal, Role.ADMIN)
        return principal.key_id

    def _key(self, request: Request) -> KeyStated:
        key = self._control.state.keys.get(KeyId(request.path_params["key_id"]))
        if key is None:
            raise NotFound(f"There is no key '{request.path_params['key_id']}'.")
        return key


def shown(key: KeyStated) -> dict[str, Any]:
    """A key as it may be shown: never itself, never its hash."""
    return {
        "id": key.key_id,
        "object": "key",
        "name": key.name,
        "role": key.role.value,
        "org": key.org,
        "hint": key.hint,
        "created": key.created_ns // SECOND_NS,
        "expires": None if key.expires_ns is None else key.expires_ns // SECOND_NS,
        "revoked": key.revoked,
        "timeouts": key.timeouts,
        "models": key.models,
        "routes": key.routes,
        "max_price": None if key.max_price == NO_CAP else _price(key.max_price),
    }


def _price(cap: PriceCap) -> dict[str, str | None]:
    return {"prompt": _per_million(cap.prompt), "completion": _per_million(cap.completion)}


def _per_million(micro: int | None) -> str | None:
    """Exact dollars."""
    return None if micro is None else f"{micro // MICRO_PER_DOLLAR}.{micro % MICRO_PER_DOLLAR:06d}"


def _state(presence: Presence, offer: RouteOffer) -> str:
    if offer.down is not None:
        return f"down: {offer.down}"
    return presence.state.value if offer.held is None else f"held: {offer.held}"


def _by_route(row: dict[str, Any]) -> tuple[str, str]:
    return row["route"], row["worker"] or ""


async def _body(request: Request, kind: type[T]) -> T:
    """Raises: BadRequest, BodyTooLarge, RequestTimeout."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > BODY_MAX_BYTES:
                    raise BodyTooLarge(f"The request body is over the limit of {BODY_MAX_BYTES} bytes.")
    except TimeoutError as error:
        raise RequestTimeout(f"The request body did not arrive within {BODY_TIMEOUT_S:g} s.") from error
    except ClientDisconnect as error:
        raise BadRequest("The client left before its request was complete.") from error  # read by nobody
    try:
        return msgspec.json.decode(bytes(body) or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise refusal(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("The request body is not JSON.") from error


def _json(body: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
