"""A text that a regular expression matches, for the patterns that people write in JSON schemas.

The pattern comes from a client, so Python's `re` never sees it: a pattern can be written that keeps `re` busy for ever.
This reads the pattern itself, once, from left to right.
"""

from __future__ import annotations

from dataclasses import dataclass

PATTERN_CHARS_MAX = 2000
GROUP_DEPTH_MAX = 20
TEXT_CHARS_MAX = 10_000

_CLASSES = {"d": "0123456789", "w": "abcdefghijklmnopqrstuvwxyz0123456789_", "s": " \t\n"}
_CONTROL = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_ANY = "x"
_COMMON = "aA0_- .,:;/x"


class _Unsupported(Exception):
    """Look-around, back references and the like."""


@dataclass(slots=True)
class _Repeat:
    what: str | _Choice  # the text of one character, or a group
    least: int
    most: int | None


@dataclass(slots=True)
class _Choice:
    branches: list[list[_Repeat]]


def text_matching(pattern: str, min_chars: int = 0) -> str | None:
    """A text that *pattern* matches, of at least *min_chars* where the pattern lets it grow; None if it can't be made."""
    if len(pattern) > PATTERN_CHARS_MAX:
        return None
    try:
        reader = _Reader(pattern)
        tree = reader.choice(depth=0)
        if reader.rest():
            return None
        text = _text(tree, [0])
        if len(text) < min_chars:
            text = _text(tree, [min_chars - len(text)])
    except _Unsupported:
        return None
    return text


def _text(choice: _Choice, extra: list[int]) -> str:
    """The first branch, with ``extra[0]`` more repeats of the first thing that may have them."""
    pieces: list[str] = []
    size = 0
    for repeat in choice.branches[0]:
        times = repeat.least
        if extra[0] and (repeat.most is None or repeat.most > repeat.least):
            more = extra[0] if repeat.most is None else min(extra[0], repeat.most - repeat.least)
            times += more
            extra[0] -= more
        if times == 0:
            continue
        one = repeat.what if isinstance(repeat.what, str) else _text(repeat.what, extra)
        size += len(one) * times
        if size > TEXT_CHARS_MAX:
            raise _Unsupported
        pieces.append(one * times)
    return "".join(pieces)


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def rest(self) -> str:
        return self._pattern[self._at :]

    def choice(self, depth: int) -> _Choice:
        if depth > GROUP_DEPTH_MAX:
            raise _Unsupported
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        return _Choice(branches)

    def _sequence(self, depth: int) -> list[_Repeat]:
        items: list[_Repeat] = []
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            if self._take("^") or self._take("$"):
                continue
            what = self._atom(depth)
            least, most = self._quantifier()
            items.append(_Repeat(what, least, most))
        return items

    def _atom(self, depth: int) -> str | _Choice:
        if self._take("("):
            self._group_kind()
            group = self.choice(depth + 1)
            if not self._take(")"):
                raise _Unsupported
            return group
        if self._take("["):
            return self._set()
        if self._take("."):
            return _ANY
        char = self._next()
        if char == "\\":
            return self._escape()[0]
        if char in "*+?":
            raise _Unsupported
        return char

    def _group_kind(self) -> None:
        if not self._take("?") or self._take(":"):
            return
        named = self._take("P<") or (self._take("<") and self.rest()[:1] not in ("=", "!"))
        end = self._pattern.find(">", self._at)
        if not named or end < 0:
            raise _Unsupported
        self._at = end + 1

    def _escape(self) -> str:
        """The characters that the escape at this place stands for, the likeliest first."""
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char in "DWS":
            return _outside(_CLASSES[char.lower()])
        if char in _CONTROL:
            return _CONTROL[char]
        if char in "xu":
            digits = self._pattern[self._at : self._at + (2 if char == "x" else 4)]
            self._at += len(digits)
            try:
                return chr(int(digits, 16))
            except ValueError as error:
                raise _Unsupported from error
        if char.isalnum():  # \b, \1, \p{...} and the like
            raise _Unsupported
        return char

    def _set(self) -> str:
        negated = self._take("^")
        members = ""
        while not self._take("]") or not members:
            low = self._member()
            if self.rest()[:1] == "-" and self.rest()[1:2] not in ("]", ""):
                self._at += 1
                high = self._member()
                if len(low) != 1 or len(high) != 1 or low > high:
                    raise _Unsupported
                members += "".join(chr(code) for code in range(ord(low), min(ord(high), ord(low) + 255) + 1))
            else:
                members += low
        return _outside(members)[0] if negated else members[0]

    def _member(self) -> str:
        char = self._next()
        return self._escape() if char == "\\" else char

    def _quantifier(self) -> tuple[int, int | None]:
        least, most = 1, 1
        found: tuple[int, int | None] = (least, most)
        if self._take("*"):
            found = (0, None)
        elif self._take("+"):
            found = (1, None)
        elif self._take("?"):
            found = (0, 1)
        elif self.rest()[:1] == "{":
            end = self._pattern.find("}", self._at)
            low, comma, high = self._pattern[self._at + 1 : end].partition(",")
            if end < 0 or not low.isdecimal() or (high and not high.isdecimal()) or len(low + high) > 8:
                raise _Unsupported
            self._at = end + 1
            found = (int(low), (int(high) if high else None) if comma else int(low))
        self._take("?")  # lazy: the same texts match
        return found

    def _take(self, sign: str) -> bool:
        if self._pattern.startswith(sign, self._at):
            self._at += len(sign)
            return True
        return False

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            raise _Unsupported
        self._at += 1
        return self._pattern[self._at - 1]


def _outside(members: str) -> str:
    found = "".join(char for char in _COMMON if char not in members)
    if not found:
        raise _Unsupported
    return found
