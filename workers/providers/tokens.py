"""Counting tokens where nobody tells the number: a tokenizer of our own for `echo`, and an estimate for other people's."""

from __future__ import annotations

import re

WORD_CHARS_MAX = 16  # a longer word is several tokens
SHORT_DELTA_BYTES = 24  # a delta up to this long is taken for one token: engines send a chunk for each
BYTES_PER_TOKEN = 4  # the common rule of thumb for longer ones
COUNTED_CHARS_MAX = 1024 * 1024  # beyond this, `count` goes by the average: counting 20 MB would hold up the loop

_TOKEN = re.compile(rf"\s?\w{{1,{WORD_CHARS_MAX}}}|\s?[^\w\s]{{1,4}}|\s")


def split(text: str, most: int | None = None) -> list[str]:
    """*text* as tokens, or its first *most*: a word or up to four signs, each with the space before it.

    Joined again they are *text*.
    """
    if most is None:
        return _TOKEN.findall(text)
    return [match[0] for _, match in zip(range(most), _TOKEN.finditer(text), strict=False)]


def count(text: str) -> int:
    """How many tokens `split` makes of *text*."""
    if len(text) <= COUNTED_CHARS_MAX:
        return sum(1 for _ in _TOKEN.finditer(text))
    return count(text[:COUNTED_CHARS_MAX]) * len(text) // COUNTED_CHARS_MAX


def estimate(size: int, short: int = SHORT_DELTA_BYTES) -> int:
    """About how many tokens *size* bytes of UTF-8 from somebody else's tokenizer are; up to *short* bytes are one."""
    if size <= 0:
        return 0
    return 1 if size <= short else -(-size // BYTES_PER_TOKEN)
