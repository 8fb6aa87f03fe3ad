from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.providers import tokens


@given(st.text())
def test_tokens_joined_again_are_the_text(text: str) -> None:
    assert "".join(tokens.split(text)) == text


@given(st.text(max_size=200), st.integers(0, 20))
def test_the_first_tokens_are_those_of_the_whole(text: str, most: int) -> None:
    assert tokens.split(text, most) == tokens.split(text)[:most]


@given(st.text())
def test_count_counts_what_split_makes(text: str) -> None:
    assert tokens.count(text) == len(tokens.split(text))


def test_words_keep_the_space_before_them() -> None:
    assert tokens.split("Hello, big  world") == ["Hello", ",", " big", " ", " world"]


def test_a_huge_text_is_counted_by_its_average() -> None:
    words = "word " * 1_000_000
    assert abs(tokens.count(words) - 1_000_000) < 10_000


def test_a_short_delta_is_one_token_and_a_long_one_goes_by_its_length() -> None:
    assert [tokens.estimate(size) for size in (0, 1, tokens.SHORT_DELTA_BYTES, 400)] == [0, 1, 1, 100]
