"""Stop sequences over a seam: whatever the text, the stops and the cut, the client reads what it would have read without one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.providers.stops import StopScanner

pieces = st.lists(st.text("ab🙂", min_size=1, max_size=3), max_size=12)
stops = st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3)


def unbroken(words: list[str], stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """As one engine does it: after each token, the stop that ends first, and of those the one that is named first."""
    text = ""
    for word in words:
        text += word
        ends = [(text.find(stop) + len(stop), n) for n, stop in enumerate(stops) if stop in text]
        if ends:
            end, n = min(ends)
            return text[: end if include else end - len(stops[n])], stops[n]
    return text, None


@given(pieces, stops, st.booleans(), st.integers(0, 12))
def test_a_cut_changes_nothing(words: list[str], stops: list[str], include: bool, cut: int) -> None:
    first = StopScanner(stops, tail="", held="", include=include)
    told = ""
    for word in words[:cut]:
        told += first.feed(word)
        if first.found is not None:
            return  # it ended before the cut
    generated = "".join(words[:cut])
    second = StopScanner(stops, tail=told, held=generated[len(told) :], include=include)
    told += second.feed("")
    for word in words[cut:]:
        told += second.feed(word)
        if second.found is not None:
            break
    else:
        told += second.end()
    assert (told, second.found) == unbroken(words, stops, include=include)


@given(pieces, stops)
def test_nothing_is_told_that_may_still_become_a_stop(words: list[str], stops: list[str]) -> None:
    scanner, told = StopScanner(stops, tail="", held="", include=False), ""
    for number, word in enumerate(words, start=1):
        told += scanner.feed(word)
        wanted, _ = unbroken(words, stops, include=False)
        assert wanted.startswith(told), number
        if scanner.found is not None:
            break
