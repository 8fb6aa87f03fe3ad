"""Tokens behind a stop: however many an engine tells at once, and however its tokens cut the characters, those count no more."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from workers.providers.vllm_onward import surplus_of

texts = st.text("aé✓🙂", max_size=5)
stops = st.text("aé✓🙂", min_size=1, max_size=6)


class Spelled:
    """A tokenizer whose tokens are pieces of one text's bytes, in their order."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    async def text_of(self, model: str, ids: tuple[int, ...]) -> str | None:
        del model
        return b"".join(self.pieces[at] for at in ids).decode(errors="replace")


def cut_up(text: str, sizes: list[int]) -> list[bytes]:
    rest, pieces = text.encode(), []
    for size in itertools.cycle(sizes):
        if not rest:
            break
        pieces.append(rest[:size])
        rest = rest[size:]
    return pieces


def ends_whole(data: bytes) -> bool:
    return not data.decode(errors="replace").endswith("\ufffd")


@given(texts, stops, texts, st.lists(st.integers(1, 3), min_size=1, max_size=40), st.data())
async def test_what_lies_behind_the_stop_is_counted(
    prefix: str, stop: str, suffix: str, sizes: list[int], data: st.DataObject
) -> None:
    text = prefix + stop + suffix
    pieces = cut_up(text, sizes)
    sizes_until = [len(b"".join(pieces[:at])) for at in range(len(pieces) + 1)]
    seams = [at for at, size in enumerate(sizes_until) if ends_whole(text.encode()[:size])]
    cut = data.draw(st.sampled_from([at for at in seams if sizes_until[at] < len((prefix + stop).encode())]))
    known = len(text.encode()[: sizes_until[cut]].decode())
    start = text.find(stop, max(0, known - len(stop) + 1))  # the first to end behind the seam
    end = len(text[: start + len(stop)].encode())
    last = next(at for at, size in enumerate(sizes_until) if size >= end)
    told = data.draw(st.integers(last, len(pieces)))
    ids = tuple(range(told))
    assert await surplus_of(Spelled(pieces), "m", stop, before=ids[:cut], generated=ids[cut:]) == told - last


async def test_the_tokens_before_the_seam_may_be_parts_of_characters() -> None:
    pieces = cut_up("Ünïcödé b", [1])
    ids = tuple(range(len(pieces)))
    seam = len("Ünïcöd".encode())
    assert await surplus_of(Spelled(pieces), "m", "Ünïcödé", before=ids[:seam], generated=ids[seam:]) == len(" b")


async def test_where_the_engine_does_not_say_none_is_dropped() -> None:
    class Silent:
        async def text_of(self, model: str, ids: tuple[int, ...]) -> str | None:
            del model, ids
            return None

    assert await surplus_of(Silent(), "m", "a", before=(1,), generated=(2, 3)) == 0
