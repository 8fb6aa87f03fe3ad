from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.money import PICO_PER_DOLLAR, Price, Usage, cost, dollars, micro_per_million
from tests.property.strategies import price_lists, prices, usages, wild_usages

MILLION = 10**6


def added(one: Usage, other: Usage) -> Usage:
    return Usage(**{name: getattr(one, name) + getattr(other, name) for name in Usage.__struct_fields__})


@given(usages(), price_lists)
def test_a_cost_is_exactly_tokens_times_dollars_per_million(usage: Usage, price: Price) -> None:
    """Worked out once more in fractions of a dollar, from the definition and not from the code."""

    def rate(own: int | None, total: int) -> Fraction:
        return Fraction(total if own is None else own, MILLION * MILLION)  # micro-dollars per million -> dollars each

    exact = (
        (usage.prompt_tokens - usage.cached_tokens - usage.audio_prompt_tokens) * rate(None, price.input)
        + usage.cached_tokens * rate(price.cached_input, price.input)
        + usage.audio_prompt_tokens * rate(price.audio_input, price.input)
        + (usage.completion_tokens - usage.reasoning_tokens - usage.audio_completion_tokens) * rate(None, price.output)
        + usage.reasoning_tokens * rate(price.reasoning, price.output)
        + usage.audio_completion_tokens * rate(price.audio_output, price.output)
    )
    assert Fraction(cost(usage, price), PICO_PER_DOLLAR) == exact


@given(usages(), usages(), price_lists)
def test_costs_add_up(one: Usage, other: Usage, price: Price) -> None:
    """A request billed in two parts costs what it costs in one."""
    assert cost(added(one, other), price) == cost(one, price) + cost(other, price)


@given(usages(), price_lists, st.integers(0, 1000))
def test_a_price_so_many_times_as_high_costs_so_many_times_as_much(usage: Usage, price: Price, times: int) -> None:
    values: dict[str, Any] = {name: getattr(price, name) for name in Price.__struct_fields__}
    dearer: dict[str, Any] = {name: None if value is None else value * times for name, value in values.items()}
    assert cost(usage, Price(**dearer)) == times * cost(usage, price)


@given(wild_usages, prices, prices)
def test_with_one_price_for_a_side_its_classes_make_no_difference(usage: Usage, input_: int, output: int) -> None:
    """Also where a provider's figures contradict each other: no token is counted twice and none is lost."""
    one = Price(input=input_, output=output)
    same = Price(
        input=input_,
        output=output,
        cached_input=input_,
        audio_input=input_,
        reasoning=output,
        audio_output=output,
    )
    total = usage.prompt_tokens * input_ + usage.completion_tokens * output
    assert cost(usage, one) == cost(usage, same) == total


@given(wild_usages, price_lists)
def test_a_cost_is_a_whole_number_between_all_tokens_at_the_least_and_at_the_highest_price(
    usage: Usage, price: Price
) -> None:
    values = [value for name in Price.__struct_fields__ if (value := getattr(price, name)) is not None]
    charged = cost(usage, price)
    assert type(charged) is int
    assert usage.total_tokens * min(values) <= charged <= usage.total_tokens * max(values)


@given(st.integers(0, 10**18))
def test_a_price_comes_back_however_it_was_written(micro: int) -> None:
    exact = Decimal(micro).scaleb(-6)
    assert micro_per_million(exact) == micro
    assert micro_per_million(f"{micro // MILLION}.{micro % MILLION:06d}") == micro
    assert micro_per_million(str(exact)) == micro


@given(st.integers(0, 10**30), st.integers(1, 9), st.integers(7, 60))
def test_a_price_finer_than_a_micro_dollar_is_never_rounded(whole: int, digit: int, place: int) -> None:
    with pytest.raises(ValueError, match="whole micro-dollars"):
        micro_per_million(f"{whole}.{'0' * (place - 1)}{digit}")


@given(st.integers(-(10**30), 10**30))
def test_dollars_shown_are_exactly_the_pico_dollars(pico: int) -> None:
    shown = dollars(pico)
    assert Fraction(shown) * PICO_PER_DOLLAR == pico
    assert len(shown.partition(".")[2]) == 12
