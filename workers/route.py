"""A route as a worker serves it: its provider, its models, and how many slots are free."""

from __future__ import annotations

import asyncio

from schemas.jobs import ModelOffer, RouteOffer
from schemas.routes import is_own
from schemas.settings import ModelSettings, RouteSettings
from workers.intake import Intake
from workers.providers.base import Provider


class Route:
    """A route that this worker serves: a provider, and room for so many attempts at once.

    In a *pool* other machines may serve it too, each with models of its own.
    """

    def __init__(
        self, settings: RouteSettings, provider: Provider, models: tuple[ModelSettings, ...], *, pool: bool = False
    ) -> None:
        self.id = settings.id
        self.provider = provider
        self.models = models
        self.slots = settings.slots
        self.free = settings.slots
        self.pool = pool
        self.own = is_own(settings)
        self.parameters = settings.parameters
        self.intake: Intake | None = None
        self.idle = asyncio.Event()
        self.idle.set()
        self.down: str | None = None  # why it takes no jobs at the moment
        self.held: str | None = None  # why its jobs wait in the queue for a short while

    def take_slot(self) -> None:
        self.free -= 1
        self.idle.clear()

    def free_slot(self) -> None:
        self.free += 1
        if self.free == self.slots:
            self.idle.set()

    def resize(self, slots: int) -> None:
        """Room for so many attempts from now on. With fewer than run, none is taken until enough have ended."""
        more, self.slots = slots - self.slots, slots
        self.free += more
        if self.intake is not None:
            self.intake.resized(more)

    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    def offer(self) -> RouteOffer:
        models = tuple(
            ModelOffer(
                name=model.name,
                price=model.charged,
                fingerprint=self.provider.fingerprint(model.name),
                continues=self.provider.continues(model.name),
            )
            for model in self.models
        )
        return RouteOffer(
            route=self.id,
            provider=self.provider.name,
            models=models,
            slots=self.slots,
            free=max(0, self.free),
            down=self.down,
            engine=self.provider.stats(),
            own=self.own,
            parameters=self.provider.parameters() if self.parameters is None else self.parameters,
            held=self.held,
            standing=self.provider.standing(),
        )
