from __future__ import annotations

from decimal import Decimal

import pytest

from schemas.money import FREE, Price, Usage, cost, dollars, micro_per_million

PRICE = Price(input=1, output=100, cached_input=10_000, reasoning=10**6, audio_input=10**8, audio_output=10**10)


def test_a_million_tokens_cost_their_price() -> None:
    usage = Usage(prompt_tokens=1_000_000, completion_tokens=2_000_000)
    price = Price(input=micro_per_million("0.15"), output=micro_per_million("0.60"))
    assert dollars(cost(usage, price)) == "1.350000000000"


def test_one_token_costs_its_price_in_pico_dollars_exactly() -> None:
    assert cost(Usage(prompt_tokens=1), Price(input=150_000)) == 150_000
    assert dollars(150_000) == "0.000000150000"


@pytest.mark.parametrize(
    ("usage", "pico"),
    [
        (Usage(), 0),
        (Usage(prompt_tokens=3), 3),
        (Usage(completion_tokens=3), 300),
        (Usage(prompt_tokens=5, cached_tokens=2), 3 + 2 * 10_000),
        (Usage(prompt_tokens=5, audio_prompt_tokens=2), 3 + 2 * 10**8),
        (Usage(prompt_tokens=5, cached_tokens=2, audio_prompt_tokens=3), 2 * 10_000 + 3 * 10**8),
        (Usage(completion_tokens=5, reasoning_tokens=2), 3 * 100 + 2 * 10**6),
        (Usage(completion_tokens=5, audio_completion_tokens=2), 3 * 100 + 2 * 10**10),
        (Usage(completion_tokens=5, reasoning_tokens=3, audio_completion_tokens=2), 3 * 10**6 + 2 * 10**10),
    ],
)
def test_each_token_is_counted_once_in_its_own_class(usage: Usage, pico: int) -> None:
    assert cost(usage, PRICE) == pico


@pytest.mark.parametrize(
    ("usage", "pico"),
    [
        (Usage(prompt_tokens=2, cached_tokens=9), 2 * 10_000),
        (Usage(prompt_tokens=2, audio_prompt_tokens=9, cached_tokens=9), 2 * 10**8),
        (Usage(prompt_tokens=4, audio_prompt_tokens=3, cached_tokens=3), 3 * 10**8 + 10_000),
        (Usage(completion_tokens=2, reasoning_tokens=9), 2 * 10**6),
        (Usage(completion_tokens=4, audio_completion_tokens=3, reasoning_tokens=3), 3 * 10**10 + 10**6),
    ],
)
def test_classes_that_say_more_than_their_total_are_cut_to_it(usage: Usage, pico: int) -> None:
    """A provider's figures can contradict each other; nobody pays for more tokens than the total."""
    assert cost(usage, PRICE) == pico


def test_a_class_without_its_own_price_has_that_of_its_total() -> None:
    usage = Usage(
        prompt_tokens=10,
        cached_tokens=3,
        audio_prompt_tokens=3,
        completion_tokens=10,
        reasoning_tokens=3,
        audio_completion_tokens=3,
    )
    assert cost(usage, Price(input=7, output=11)) == 10 * 7 + 10 * 11


def test_a_class_priced_at_nothing_is_free() -> None:
    """Zero is a price; only a missing one falls back to the total's."""
    assert cost(Usage(prompt_tokens=5, cached_tokens=5), Price(input=7, cached_input=0)) == 0
    assert cost(Usage(completion_tokens=5, reasoning_tokens=5), Price(output=7, reasoning=0)) == 0


def test_what_is_free_costs_nothing() -> None:
    assert cost(Usage(prompt_tokens=10**9, completion_tokens=10**9), FREE) == 0


def test_the_total_is_both_sides_and_no_class_twice() -> None:
    assert Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2, reasoning_tokens=2).total_tokens == 7


@pytest.mark.parametrize(
    ("written", "micro"),
    [("0.15", 150_000), (Decimal("0.075"), 75_000), (3, 3_000_000), ("0", 0), ("0.000001", 1), ("1E+2", 10**8)],
)
def test_a_price_in_dollars_becomes_whole_micro_dollars(written: Decimal | int | str, micro: int) -> None:
    assert micro_per_million(written) == micro


@pytest.mark.parametrize(
    "written",
    ["-0.01", "0.0000001", "1.0000000000000000000000000000001", "NaN", "Infinity", "-Infinity", "cheap", ""],
)
def test_a_price_that_cannot_be_kept_exactly_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="a price must be"):
        micro_per_million(written)


@pytest.mark.parametrize(
    ("pico", "shown"),
    [
        (0, "0.000000000000"),
        (1, "0.000000000001"),
        (10**12, "1.000000000000"),
        (1_500_000_000_000, "1.500000000000"),
        (-1, "-0.000000000001"),
        (-2_000_000_000_003, "-2.000000000003"),
    ],
)
def test_dollars_are_shown_exactly(pico: int, shown: str) -> None:
    assert dollars(pico) == shown
