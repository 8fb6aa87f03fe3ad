"""An ingress with several routes for the same model, each with a provider and a worker of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bus.connection import Message
from schemas.settings import IngressSettings, RouteSettings, WorkerSettings
from tests.integration.ingress.gateway import (
    Event,
    IngressUnderTest,
    ingress_up,
    route_settings,
    worker_up,
)
from tests.mock_provider import MockProvider
from tests.waiting import eventually
from workers.route import Route
from workers.worker import Worker


@dataclass(kw_only=True)
class Place:
    """A route, what serves it and who generates there."""

    settings: RouteSettings
    mock: MockProvider
    worker: Worker
    route: Route


@dataclass(kw_only=True)
class Routes:
    ingress: IngressUnderTest
    places: dict[str, Place]
    events: list[Event] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return self.ingress.base_url

    @property
    def chat_url(self) -> str:
        return f"{self.base_url}/chat/completions"

    def mock(self, name: str) -> MockProvider:
        return self.places[name].mock

    def of(self, request_id: str | None, kind: str) -> list[Event]:
        return [e for e in self.events if kind == e["kind"] and request_id in (None, e["request_id"])]

    async def ending(self, request_id: str | None = None) -> Event:
        await eventually(lambda: self.of(request_id, "request.finished"), what="a closing event")
        (event,) = self.of(request_id, "request.finished")
        return event

    async def receipts(self, request_id: str, count: int) -> dict[str, Event]:
        """The workers' events of the request by route, once there are *count*."""
        await eventually(lambda: len(self.of(request_id, "attempt.finished")) == count, what=f"{count} receipts")
        return {event["route"]: event for event in self.of(request_id, "attempt.finished")}

    async def quiet(self) -> None:
        """Returns when nothing is left of any request."""
        await eventually(lambda: len(self.ingress.switchboard) == 0, what="an empty switchboard")
        for place in self.places.values():
            await eventually(lambda p=place: p.route.free == p.route.slots, what="free slots")  # type: ignore[misc]
            await eventually(lambda p=place: not any(each._task for each in p.mock._live), what="an idle provider")  # type: ignore[misc]
        await eventually(lambda: not self.ingress.server.state.tasks, what="no request's task")

    async def jobs_waiting(self, count: int) -> None:
        async def check() -> bool:
            answer = await self.ingress.connection.api("STREAM.INFO.JOBS")
            return int(answer["state"]["messages"]) == count

        await eventually(check, what=f"{count} jobs in the queue")  # type: ignore[arg-type]  # T is the coroutine's


@contextlib.asynccontextmanager
async def routes_up(
    nats_url: str,
    *names: str,
    ingress: IngressSettings | None = None,
    worker: WorkerSettings | None = None,
    slots: int = 8,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> AsyncIterator[Routes]:
    """Routes of these *names*, tried in this order, with *changes* to their settings; *more* goes to `ingress_up`."""
    async with contextlib.AsyncExitStack() as stack:
        mocks = {name: await stack.enter_async_context(MockProvider()) for name in names}
        settings = {
            name: msgspec.structs.replace(route_settings(mock, name=name, slots=slots), **(changes or {}).get(name, {}))
            for name, mock in mocks.items()
        }
        up = await stack.enter_async_context(
            ingress_up(nats_url, settings=ingress or IngressSettings(), routes=tuple(settings.values()), **more)
        )
        places = {}
        for name, route in settings.items():
            running, served = await stack.enter_async_context(worker_up(nats_url, route, settings=worker))
            places[name] = Place(settings=route, mock=mocks[name], worker=running, route=served)
        made = Routes(ingress=up, places=places)

        async def on_page(msg: Message) -> None:
            made.events.extend(msgspec.json.decode(line) for line in msg.data.split(b"\n"))

        await up.connection.listen("events.>", on_page)
        await eventually(lambda: len(up.fleet.workers()) == len(names), what="the workers' presence")
        yield made
        await made.quiet()
