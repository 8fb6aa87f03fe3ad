"""The order of the places that a request may go to: strategies by name, one within the other; pure.

A strategy gives each candidate a score, the lowest first. Candidates that it finds alike are put in order by the next one of
its list; those that all find alike stay as they were, which is the operator's order.
Source: docs/adr/0060-routing.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ingress.policy.measured import Speed
from schemas.ids import RouteId
from schemas.money import Price, Usage, cost
from schemas.routing import Block, items_of

UNRANKED = 1_000_000  # of a route that the operator didn't configure
OWN = "own"
FIRST = -1.0
LAST = math.inf

SLOWER_IS_ALIKE = 1.25  # for the strategy within it: so much slower is no difference
USED_IS_ALIKE = 0.1  # nor is a tenth of the slots


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model on a route. Names in *names* mean it: the route's id and its provider."""

    route: RouteId
    model: str
    price: Price
    rank: int = UNRANKED
    own: bool = False
    names: frozenset[str] = frozenset()
    weight: int = 1
    tokens_per_minute: int = 0  # 0: not known
    quantisations: frozenset[str] = frozenset()  # of the machines behind it; of some it is not known
    parameters: frozenset[str] | None = None  # that it is known to honour


class Facts(Protocol):
    """What the strategies ask of the moment. *usage* is what the request will probably use."""

    @property
    def usage(self) -> Usage: ...

    def speed(self, candidate: Candidate) -> Speed | None: ...

    def explores(self, candidate: Candidate) -> bool:
        """Whether an attempt is due that would tell how fast it is."""
        ...

    def slots(self, candidate: Candidate) -> tuple[int, int]:
        """How many are taken, and how many there are."""
        ...

    def last_minute(self, candidate: Candidate) -> int:
        """Tokens used there."""
        ...

    def dice(self) -> float:
        """From 0 up to 1."""
        ...


Placed = tuple[Candidate, str]  # and why it stands there
Alike = Callable[[float, float], bool]  # whether a score is as good as the best of its group


@dataclass(frozen=True, slots=True)
class Strategy:
    score: Callable[[Candidate, Facts], float]
    why: Callable[[Candidate, Facts, float], str]
    alike: Alike = lambda best, score: score == best


def arrange(candidates: Sequence[Candidate], order: Sequence[str | Block], facts: Facts) -> list[Placed]:
    """*candidates* by the strategies of *order*, each with the reasons for its place."""
    if not order:
        return [(candidate, "") for candidate in candidates]
    first, rest = order[0], order[1:]
    if isinstance(first, Block):
        wanted = frozenset(first.routes)
        inside = [candidate for candidate in candidates if means(wanted, candidate)]
        outside = [candidate for candidate in candidates if not means(wanted, candidate)]
        block = ", ".join(first.routes)
        placed = [(c, _and(f"of {block}", why)) for c, why in arrange(inside, items_of(first.strategy), facts)]
        return placed + arrange(outside, rest, facts)
    return [*_arranged(candidates, _STRATEGIES[first], rest, facts)]


def _arranged(
    candidates: Sequence[Candidate], strategy: Strategy, rest: Sequence[str | Block], facts: Facts
) -> Iterator[Placed]:
    scored = [(strategy.score(candidate, facts), i, candidate) for i, candidate in enumerate(candidates)]
    scored.sort(key=lambda entry: entry[:2])
    while scored:
        best = scored[0][0]
        size = next((n for n, entry in enumerate(scored) if not _alike(strategy, rest, best, entry[0])), len(scored))
        group, scored = scored[:size], scored[size:]
        scores = {id(candidate): score for score, _, candidate in group}
        for candidate, why in arrange([candidate for _, _, candidate in group], rest, facts):
            yield candidate, _and(strategy.why(candidate, facts, scores[id(candidate)]), why)


def _alike(strategy: Strategy, rest: Sequence[str | Block], best: float, score: float) -> bool:
    return score == best or (bool(rest) and strategy.alike(best, score))


def means(names: frozenset[str], candidate: Candidate) -> bool:
    return not names.isdisjoint(candidate.names) or (candidate.own and OWN in names)


def _and(one: str, other: str) -> str:
    return f"{one}, {other}" if one and other else one or other


def _price_words(candidate: Candidate) -> str:
    price = candidate.price
    if price.unknown:
        return "price unknown"
    return f"${_dollars(price.input)} in and ${_dollars(price.output)} out" if price.input or price.output else "free"


def _dollars(micro: int) -> str:
    return f"{micro / 1_000_000:.6f}".rstrip("0").rstrip(".")


def _cheapest(candidate: Candidate, facts: Facts) -> float:
    # An integer, which Python compares with infinity exactly, however large it is.
    return LAST if candidate.price.unknown else cost(facts.usage, candidate.price)


def _measured(score: Callable[[Speed, Usage], float]) -> Callable[[Candidate, Facts], float]:
    """By *score* where the speed is known. Where it isn't: first for the attempt that tells it, else last."""

    def scored(candidate: Candidate, facts: Facts) -> float:
        speed = facts.speed(candidate)
        if speed is None:
            return FIRST if facts.explores(candidate) else LAST
        return score(speed, facts.usage)

    return scored


def _speed_words(candidate: Candidate, facts: Facts, score: float) -> str:
    speed = facts.speed(candidate)
    if speed is None:
        return "tried to measure it" if score == FIRST else "not measured lately"
    pace = "" if math.isinf(speed.tokens_per_s) else f" and {speed.tokens_per_s:.0f} tokens/s"
    return f"{speed.first_token_us / 1000:.0f} ms to the {'end' if speed.whole else 'first token'}{pace}"


def _in_all_us(speed: Speed, usage: Usage) -> float:
    after_us = 0.0 if speed.whole else usage.completion_tokens / speed.tokens_per_s * 1e6
    return speed.first_token_us + after_us


def _hardly_slower(best: float, score: float) -> bool:
    return best > FIRST and score <= best * SLOWER_IS_ALIKE


def _busy(candidate: Candidate, facts: Facts) -> float:
    taken, slots = facts.slots(candidate)
    return taken / slots if slots else LAST


def _busy_words(candidate: Candidate, facts: Facts, _: float) -> str:
    return "{} of {} slots taken".format(*facts.slots(candidate))


def _thrown(candidate: Candidate, facts: Facts) -> float:
    """The first arrival of each at its own rate: the chance to come first is in proportion to the weight."""
    return -math.log1p(-facts.dice()) / candidate.weight if candidate.weight else LAST


def _used(candidate: Candidate, facts: Facts) -> float:
    tokens = facts.last_minute(candidate)
    return tokens / candidate.tokens_per_minute if candidate.tokens_per_minute else tokens / UNKNOWN_TOKENS_PER_MINUTE


def _used_words(candidate: Candidate, facts: Facts, _: float) -> str:
    limit = f" of {candidate.tokens_per_minute}" if candidate.tokens_per_minute else ""
    return f"{facts.last_minute(candidate)}{limit} tokens in the last minute"


UNKNOWN_TOKENS_PER_MINUTE = 1_000_000  # as if: an account whose limit nobody stated

_STRATEGIES = {
    "ordered": Strategy(lambda c, _: c.rank, lambda c, *_: f"rank {c.rank}" if c.rank < UNRANKED else "not ranked"),
    "own_first": Strategy(lambda c, _: 0 if c.own else 1, lambda c, *_: "own" if c.own else "not own"),
    "cheapest": Strategy(_cheapest, lambda c, *_: _price_words(c)),
    "fastest": Strategy(_measured(_in_all_us), _speed_words, _hardly_slower),
    "latency": Strategy(_measured(lambda speed, _: speed.first_token_us), _speed_words, _hardly_slower),
    "throughput": Strategy(_measured(lambda speed, _: 1e6 / speed.tokens_per_s), _speed_words, _hardly_slower),
    "least_busy": Strategy(_busy, _busy_words, lambda best, score: score - best <= USED_IS_ALIKE),
    "weighted": Strategy(_thrown, lambda c, *_: f"weight {c.weight}"),
    "usage_based": Strategy(_used, _used_words, lambda best, score: score - best <= USED_IS_ALIKE),
}
