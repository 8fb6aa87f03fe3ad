"""The HTTP application: its routes and its error handling, in one place."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bus.connection import Connection
from bus.control import ControlFeed
from ingress.admin import Admin
from ingress.answer import send_problem
from ingress.auth import authenticate
from ingress.chat import ChatCompletions
from ingress.exchange import Services
from ingress.fleet import Fleet
from ingress.problems import problem_of
from ingress.stopping import uncancel
from schemas import openapi
from schemas.control import KeyStated
from schemas.errors import MethodNotAllowed, ModelNotFound, NotFound, PenstockError, Stopping
from schemas.ids import new_id
from schemas.settings import IngressSettings

SECOND_NS = 1_000_000_000
CHAT_PATH = "/v1/chat/completions"


def build_app(
    connection: Connection,
    services: Services,
    *,
    control: ControlFeed,
    fleet: Fleet,
    settings: IngressSettings,
) -> ASGIApp:
    chat = ChatCompletions(services, control=control, settings=settings)
    models = Models(control, fleet)
    admin = Admin(control, fleet, services.router, producer=services.log.producer)
    health = Health(connection, fleet)
    rest = Starlette(
        routes=[
            Route("/v1/models", models.list, methods=["GET"]),
            Route("/v1/models/{model:path}", models.retrieve, methods=["GET"]),
            Route("/v1/models/{model:path}", models.delete, methods=["DELETE"]),
            Route(CHAT_PATH + "/{completion_id}", Endpoint(chat.replays.resume), methods=["GET"]),
            Route("/healthz", health.live, methods=["GET"]),
            Route("/readyz", health.ready, methods=["GET"]),
            Route("/openapi.json", api_description, methods=["GET"]),
            Route("/admin/v1/keys", admin.list_keys, methods=["GET"]),
            Route("/admin/v1/keys", admin.create_key, methods=["POST"]),
            Route("/admin/v1/keys/{key_id}/rotate", admin.rotate_key, methods=["POST"]),
            Route("/admin/v1/keys/{key_id}", admin.revoke_key, methods=["DELETE"]),
            Route("/admin/v1/routes", admin.list_routes, methods=["GET"]),
        ],
        exception_handlers={PenstockError: _on_error, HTTPException: _on_http_error},
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # The one path that is hot goes around the router and its layers: they are a twentieth of its CPU.
        if scope["type"] == "http" and scope["path"] == CHAT_PATH:
            await chat(scope, receive, send)
        else:
            await _to_its_end(rest, scope, receive, send)

    return app


async def _to_its_end(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Runs *app*; what the end of a drain cuts off says so, if it has said nothing yet. The hot path sees to that itself."""
    began = False

    async def say(message: Message) -> None:
        nonlocal began
        began = True
        await send(message)

    try:
        await app(scope, receive, say)
    except asyncio.CancelledError:
        uncancel()
        if not began:
            await send_problem(send, problem_of(Stopping()), [(b"x-request-id", new_id().encode())])


class Endpoint:
    """A plain ASGI application among the routes, which take a function for something else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class Models:
    """What is served now, as the API lists it."""

    def __init__(self, control: ControlFeed, fleet: Fleet) -> None:
        self._control = control
        self._fleet = fleet
        self._began_ns = time.time_ns()

    async def list(self, request: Request) -> Response:
        key = self._authenticate(request)
        found = [self._shown(model) for model in self._fleet.models() if _may_ask(key, model)]
        return _json({"object": "list", "data": found})

    async def retrieve(self, request: Request) -> Response:
        return _json(self._shown(self._served(request)))

    async def delete(self, request: Request) -> Response:
        """Deletes nothing, and says so: models are the workers' and the providers'."""
        return _json({"id": self._served(request), "object": "model", "deleted": False})

    def _authenticate(self, request: Request) -> KeyStated:
        return authenticate(request.scope["headers"], self._control.state, now_ns=time.time_ns())

    def _served(self, request: Request) -> str:
        key = self._authenticate(request)
        model: str = request.path_params["model"]
        if not self._fleet.offers(model) or not _may_ask(key, model):
            raise ModelNotFound(f"The model '{model}' does not exist here, or nobody serves it now.", param="model")
        return model

    def _shown(self, model: str) -> dict[str, object]:
        routes = sorted(self._fleet.offers(model))
        stated = [self._control.state.routes[route] for route in routes if route in self._control.state.routes]
        created_ns = min((route.created_ns for route in stated), default=self._began_ns)
        return {"id": model, "object": "model", "created": created_ns // SECOND_NS, "owned_by": routes[0]}


def _may_ask(key: KeyStated, model: str) -> bool:
    return key.models is None or model in key.models


class Health:
    def __init__(self, connection: Connection, fleet: Fleet) -> None:
        self._connection = connection
        self._fleet = fleet

    async def live(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Ready when requests can be queued. How many models are served is told, but none is still ready: the queue works."""
        up = self._connection.is_up
        body = {"status": "ok" if up else "unavailable", "nats": up, "models": len(self._fleet.models())}
        return _json(body, status=200 if up else 503)


async def api_description(_: Request) -> Response:
    return _json(openapi.document(version=importlib.metadata.version("penstock")))


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, PenstockError)  # noqa: S101 - for the type checker
    problem = problem_of(error)
    headers = {name.decode(): value.decode() for name, value in problem.headers}
    headers["x-request-id"] = new_id()
    return Response(problem.body, status_code=problem.status, headers=headers, media_type="application/json")


async def _on_http_error(request: Request, error: Exception) -> Response:
    """The router's own errors, in OpenAI's shape like all others."""
    assert isinstance(error, HTTPException)  # noqa: S101 - for the type checker
    if error.status_code == METHOD_NOT_ALLOWED:
        answer = await _on_error(request, MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}."))
        answer.headers.update(error.headers or {})  # Allow
        return answer
    return await _on_error(request, NotFound(f"There is nothing at {request.method} {request.url.path}."))


METHOD_NOT_ALLOWED = 405


def _json(body: object, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
