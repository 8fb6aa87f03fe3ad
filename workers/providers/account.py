"""One key at a provider, and the provider as it is with that key alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from schemas.errors import Fault, SetupError
from schemas.settings import RouteSettings
from workers.providers.base import Provider
from workers.providers.keys import label_of
from workers.providers.openai import first_key
from workers.providers.retries import KEYS_MAX

log = structlog.get_logger()

Make = Callable[[RouteSettings], Provider]
OnOpen = Callable[[Provider], None]

NO_KEY = "none"
HIDDEN = "[key]"


class Account:
    """*route* has this key alone, or none."""

    def __init__(self, route: RouteSettings, label: str, make: Make, on_open: OnOpen) -> None:
        self.label = label
        self.provider: Provider | None = None  # None while the key can't be read
        self._route = route
        self._make = make
        self._on_open = on_open
        self._key: str | None = None  # that the provider has; told to nobody
        self._retired: list[Provider] = []

    def open(self) -> None:
        """Raises: SetupError if the route can't work as it is written, or the key can't be read."""
        self._opened()
        self._key = first_key(self._route)

    async def renewed(self) -> bool:
        """Whether its file holds another key than the one that was taken from it; that one is used from now on."""
        if not any(reference.startswith("file:") for reference in self._route.api_keys):
            return False
        try:
            key = await asyncio.to_thread(first_key, self._route)
        except SetupError:
            return False
        if key == self._key:
            return False
        self._key = key
        if self.provider is not None:
            self._retired.append(self.provider)  # its streams may still run
        self._opened()
        log.info("provider_key_renewed", route=self._route.id, key=self.label)
        return True

    def hide_key(self, fault: Fault) -> None:
        """A refusal of a request keeps the provider's words: without the key, where it says that."""
        if self._key:
            fault.message = fault.message.replace(self._key, HIDDEN)
            fault.args = (fault.message,)
            fault.param = fault.param and fault.param.replace(self._key, HIDDEN)
            fault.type = fault.type and fault.type.replace(self._key, HIDDEN)
            fault.upstream_code = fault.upstream_code and fault.upstream_code.replace(self._key, HIDDEN)

    async def aclose(self) -> None:
        for provider in (*self._retired, self.provider):
            if provider is not None:
                await provider.aclose()

    def _opened(self) -> None:
        self.provider = self._make(self._route)
        self._on_open(self.provider)


def open_accounts(route: RouteSettings, make: Make, *, on_open: OnOpen) -> list[Account]:
    """An account for each of the route's keys; one, if it has none.

    A key that can't be read is left for later, as long as another one can be.
    Raises: SetupError.
    """
    if len(route.api_keys) > KEYS_MAX:
        raise SetupError(f"route {route.id!r}: at most {KEYS_MAX} keys are taken")
    accounts, unread = [], None
    for number, reference in enumerate(route.api_keys, 1):
        account = Account(
            msgspec.structs.replace(route, api_keys=(reference,)), label_of(reference, number), make, on_open
        )
        accounts.append(account)
        try:
            account.open()
        except SetupError as error:
            unread = unread or error
    if not accounts:
        account = Account(route, NO_KEY, make, on_open)
        account.open()
        accounts.append(account)
    if unread is not None and all(account.provider is None for account in accounts):
        raise unread
    return accounts
