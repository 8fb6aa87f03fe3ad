"""The keys of a route: which one a try gets, which rest, which are dead; pure, the clock and the dice are passed in.

============  ============================================  ===================================================
a key is      since                                         until
============  ============================================  ===================================================
*ready*       its first try, or a probe that was answered   the provider limits or refuses it
*cooling*     429                                           what the provider asked for, else a growing back-off
*dead*        401, 402, 403; 429 without any quota left;    a probe of it is answered
              or it can't be read
============  ============================================  ===================================================

A key is known by its label: the place that it is read from, or its number. Itself it is not in here at all.
Source: docs/adr/0051-keys-of-a-route.md
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from schemas.standing import KeyStanding, KeyState, Rates
from workers.providers.health import Backoff, Dice
from workers.providers.pace import Allowance, Window
from workers.providers.rate_headers import Told


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRules:
    cooling_first_s: float = 1.0  # after a 429 that names no time; then twice as long each time
    cooling_max_s: float = 60.0
    probe_first_s: float = 1.0  # of a dead key
    probe_max_s: float = 600.0
    minute_s: float = 60.0  # how long a route's minute is


@dataclass(slots=True)
class Key:
    label: str
    running: int = 0
    turn: int = 0  # of its last try, among all of the route's
    limited: int = 0  # how many 429s in a row
    cools_until: float = 0.0
    dead: str | None = None  # why, if it is
    backoff: Backoff | None = None  # of a dead one: when it is probed
    requests: Allowance = field(default_factory=Allowance)
    tokens: Allowance = field(default_factory=Allowance)

    def free_at(self, now: float, tokens: int) -> float:
        """When it may be used for so many tokens."""
        return max(now, self.cools_until, self.requests.free_at(now, 1), self.tokens.free_at(now, tokens))

    def told(self, now: float) -> KeyStanding:
        state, reason, for_s = KeyState.READY, None, None
        if self.dead is not None:
            state, reason, for_s = KeyState.DEAD, self.dead, None if self.backoff is None else self.backoff.at - now
        elif self.cools_until > now:
            state, reason, for_s = KeyState.COOLING, "HTTP 429", self.cools_until - now
        return KeyStanding(
            label=self.label,
            state=state,
            reason=reason,
            for_s=None if for_s is None else round(max(0.0, for_s), 1),
            running=self.running,
            requests_left=_whole(self.requests.left),
            tokens_left=_whole(self.tokens.left),
        )


@dataclass(slots=True)
class Grant:
    """A try's right to be sent, with this key and about so many tokens."""

    key: Key
    tokens: int
    slot: int
    answered: bool = False  # the provider's figures have it


@dataclass(frozen=True, slots=True)
class Wait:
    """There is no room before *until*."""

    until: float
    why: str


class KeyRing:
    """The keys of one route and the route's own limits; 0 is none."""

    def __init__(
        self,
        labels: Iterable[str],
        *,
        requests_per_minute: int = 0,
        tokens_per_minute: int = 0,
        rules: KeyRules,
        dice: Dice,
    ) -> None:
        self.keys = [Key(label) for label in labels]
        self._requests = Window(requests_per_minute, span_s=rules.minute_s)
        self._tokens = Window(tokens_per_minute, span_s=rules.minute_s)
        self._rules = rules
        self._dice = dice
        self._turns = 0

    def grant(self, now: float, tokens: int) -> Grant | Wait | None:
        """A key for a try: of those with room the one with the fewest running, then the one that waits longest.

        A `Wait` if there is no room now; None if all keys are dead.
        """
        found = self.look(now, tokens)
        return self._granted(now, found, tokens) if isinstance(found, Key) else found

    def look(self, now: float, tokens: int = 1) -> Key | Wait | None:
        """What `grant` would find."""
        alive = [key for key in self.keys if key.dead is None]
        if not alive:
            return None
        requests_at, tokens_at = self._requests.free_at(now, 1), self._tokens.free_at(now, tokens)
        if max(requests_at, tokens_at) > now:
            return Wait(max(requests_at, tokens_at), self._limit_told(requests=requests_at >= tokens_at))
        free = [(key.free_at(now, tokens), key.running, key.turn, place) for place, key in enumerate(alive)]
        ready = [(running, turn, place) for at, running, turn, place in free if at <= now]
        if ready:
            return alive[min(ready)[2]]
        return Wait(min(free)[0], "the provider's rate limit is reached")

    def probe(self, now: float, key: Key) -> Grant:
        """A probe's right, whatever the limits say."""
        return self._granted(now, key, 1)

    def ended(self, grant: Grant, used: int | None) -> None:
        """The try is over; *used* are its tokens, if they are known."""
        grant.key.running -= 1
        self._answered(grant)
        if used is not None:
            self._tokens.settle(grant.slot, used - grant.tokens)

    def told(self, now: float, grant: Grant, *, requests: Told, tokens: Told) -> None:
        """What the head of the try's answer tells of the key's limits."""
        self._answered(grant)
        grant.key.requests.told(now, requests)
        grant.key.tokens.told(now, tokens)

    def served(self, now: float, key: Key) -> None:
        """A try was answered. One that was sent before the key was limited or refused says nothing about that."""
        if key.cools_until <= now:
            key.limited = 0

    def revive(self, key: Key) -> None:
        """A probe of it was answered: it is as new."""
        key.limited = 0
        key.cools_until = 0.0
        key.dead = key.backoff = None

    def limit(self, now: float, key: Key, retry_after_s: float | None) -> None:
        """The provider said 429: the key cools as long as it asked for, or longer each time.

        Those that were under way when it began to cool say nothing new.
        """
        if retry_after_s is None and key.cools_until > now:
            return
        backoff_s = min(self._rules.cooling_first_s * 2**key.limited, self._rules.cooling_max_s)
        jittered_s = backoff_s * (0.75 + 0.5 * self._dice())
        key.limited = min(key.limited + 1, 30)
        key.cools_until = max(key.cools_until, now + (jittered_s if retry_after_s is None else retry_after_s))

    def kill(self, now: float, key: Key, why: str) -> None:
        """The provider refused it, or it can't be read. A probe that fails once more comes later the next time."""
        if key.backoff is None:
            first_s, max_s = self._rules.probe_first_s, self._rules.probe_max_s
            key.backoff = Backoff(now, first_s=first_s, max_s=max_s, dice=self._dice)
        else:
            key.backoff.again(now)
        key.dead = why

    def rates(self, now: float) -> Rates:
        return Rates(
            requests=self._requests.used(now),
            requests_per_minute=self._requests.limit,
            tokens=self._tokens.used(now),
            tokens_per_minute=self._tokens.limit,
        )

    def _granted(self, now: float, key: Key, tokens: int) -> Grant:
        self._turns += 1
        key.turn = self._turns
        key.running += 1
        key.requests.take(1)
        key.tokens.take(tokens)
        self._requests.take(now, 1)
        return Grant(key, tokens, self._tokens.take(now, tokens))

    @staticmethod
    def _answered(grant: Grant) -> None:
        if not grant.answered:
            grant.answered = True
            grant.key.requests.answered(1)
            grant.key.tokens.answered(grant.tokens)

    def _limit_told(self, *, requests: bool) -> str:
        limit, of = (self._requests.limit, "requests") if requests else (self._tokens.limit, "tokens")
        return f"its {limit} {of} a minute are used up"


def label_of(reference: str, number: int) -> str:
    """What a key is called: where it is read from. One that was written as itself is only numbered."""
    return reference if reference.startswith(("env:", "file:")) else f"#{number}"


def _whole(left: float) -> int | None:
    return None if left == float("inf") else max(0, int(left))
