"""Whether anybody listens on a subject: the server knows, and says so at once when nobody does.

A client's subscriptions end with its connection, so this tells within a round trip that a process was killed, also through
a cluster. Nobody has to answer.
"""

from __future__ import annotations

from collections.abc import Callable

import nats.errors

from bus.connection import BusUnavailable, Connection, Message

NO_RESPONDERS = "503"

OnNobody = Callable[[str], None]


class Listeners:
    """*on_nobody* gets the name under which was asked."""

    def __init__(self, connection: Connection, *, on_nobody: OnNobody) -> None:
        self._connection = connection
        self._on_nobody = on_nobody
        self._inbox = ""

    async def start(self) -> None:
        self._inbox = self._connection.nc.new_inbox()
        await self._connection.listen(f"{self._inbox}.*", self._on_answer)

    async def ask(self, subject: str, *, name: str) -> None:
        """*name* is a subject token. Raises: BusUnavailable."""
        try:
            await self._connection.nc.publish(subject, b"", reply=f"{self._inbox}.{name}")
        except nats.errors.Error as error:
            raise BusUnavailable(f"NATS took no message: {type(error).__name__}") from error

    async def _on_answer(self, msg: Message) -> None:
        if msg.headers is not None and msg.headers.get("Status") == NO_RESPONDERS:
            self._on_nobody(msg.subject.removeprefix(f"{self._inbox}."))
