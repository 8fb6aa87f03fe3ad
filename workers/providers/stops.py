"""Stop sequences, looked for by ourselves: one may begin in what an earlier engine said and end in what this one says. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Lets text through up to the first of *stops*, and holds back what may become one, as vLLM does.

    *tail* is the end of what was delivered, *held* what the earlier engine generated behind it and held back: neither holds
    a whole stop. With *include* the stop itself is let through, too.
    """

    def __init__(self, stops: Sequence[str], *, tail: str, held: str, include: bool) -> None:
        self.found: str | None = None
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=1)
        self._include = include
        tail = tail[-self._longest :]
        self._text = tail + held
        self._sent = len(tail)

    def feed(self, text: str) -> str:
        """What may be told now that *text* has come."""
        known = len(self._text)
        self._text += text
        if text:
            self._look(known)
        end = len(self._text) if self._include or self.found is not None else len(self._text) - (self._longest - 1)
        return self._let_through(end)

    def end(self) -> str:
        """The rest, when nothing more comes."""
        return self._let_through(len(self._text))

    def _look(self, known: int) -> None:
        """The stop that ends first wins; of two that end together, the one that is named first."""
        best_end, best_start = len(self._text) + 1, 0
        for stop in self._stops:
            start = self._text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and start + len(stop) < best_end:
                best_end, best_start, self.found = start + len(stop), start, stop
        if self.found is not None:
            self._text = self._text[: best_end if self._include else best_start]

    def _let_through(self, end: int) -> str:
        end = max(self._sent, end)
        told, self._sent = self._text[self._sent : end], end
        spare = self._sent - self._longest  # what lies further back can be part of no stop
        if spare > 0:
            self._text = self._text[spare:]
            self._sent -= spare
        return told
