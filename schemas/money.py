"""Money: exact integers, never a float.

A price is whole micro-dollars per million tokens. That is the same number as pico-dollars per token, so
tokens x price is whole pico-dollars and nothing is ever rounded.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import NewType

from msgspec import Struct

Pico = NewType("Pico", int)  # pico-dollars: 10**12 of them are one US dollar

PICO_PER_DOLLAR = 10**12
MICRO_PER_DOLLAR = 10**6


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens of one request, as OpenAI counts them: the classes are parts of the two totals, not additions to them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # part of prompt_tokens
    reasoning_tokens: int = 0  # part of completion_tokens
    audio_prompt_tokens: int = 0  # part of prompt_tokens
    audio_completion_tokens: int = 0  # part of completion_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Price(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whole micro-dollars per million tokens of each class; a class without its own price has its total's."""

    input: int = 0
    output: int = 0
    cached_input: int | None = None
    reasoning: int | None = None
    audio_input: int | None = None
    audio_output: int | None = None
    unknown: bool = False  # nobody stated a price: what is counted at it costs 0, but that doesn't make it free


class PriceCap(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The most that is paid, in whole micro-dollars per million tokens of the prompt and of the completion; None is no limit."""

    prompt: int | None = None
    completion: int | None = None

    def allows(self, price: Price) -> bool:
        """Whether *price* is known and within the limits, in each of a text's classes of tokens."""
        if self.prompt is None and self.completion is None:
            return True
        if price.unknown:
            return False
        prompt, completion = _dearest(price.input, price.cached_input), _dearest(price.output, price.reasoning)
        return (self.prompt is None or prompt <= self.prompt) and (
            self.completion is None or completion <= self.completion
        )


NO_CAP = PriceCap()

PROMPT_BYTES_PER_TOKEN = 4

FREE = Price()
UNKNOWN = Price(unknown=True)


def cost(usage: Usage, price: Price) -> Pico:
    """What *usage* costs at *price*, exact. Each token is counted once, in its dearest-named class."""
    audio_in = min(usage.audio_prompt_tokens, usage.prompt_tokens)
    cached = min(usage.cached_tokens, usage.prompt_tokens - audio_in)
    audio_out = min(usage.audio_completion_tokens, usage.completion_tokens)
    reasoning = min(usage.reasoning_tokens, usage.completion_tokens - audio_out)
    return Pico(
        (usage.prompt_tokens - audio_in - cached) * price.input
        + cached * _or(price.cached_input, price.input)
        + audio_in * _or(price.audio_input, price.input)
        + (usage.completion_tokens - audio_out - reasoning) * price.output
        + reasoning * _or(price.reasoning, price.output)
        + audio_out * _or(price.audio_output, price.output)
    )


def estimate(*, prompt_bytes: int, completion_tokens: int) -> Usage:
    """The usage where no provider told it: the prompt by its length, the answer as it was counted on its way."""
    return Usage(prompt_tokens=max(1, prompt_bytes // PROMPT_BYTES_PER_TOKEN), completion_tokens=completion_tokens)


def micro_per_million(dollars: Decimal | int | str) -> int:
    """A price as people write it, US dollars per million tokens, as whole micro-dollars per million tokens.

    Raises: ValueError if it is no number, negative, or finer than a micro-dollar.
    """
    try:
        micro = Fraction(Decimal(dollars)) * MICRO_PER_DOLLAR  # exact, where a product of Decimals would be rounded
    except (ArithmeticError, ValueError) as error:  # not a number, or none that is finite
        raise ValueError(f"a price must be a number of dollars, not {dollars}") from error
    if micro < 0 or micro.denominator != 1:
        raise ValueError(
            f"a price must be zero or more and whole micro-dollars per million tokens, not {dollars} dollars"
        )
    return micro.numerator


def dollars(pico: int) -> str:
    """*pico* as exact decimal dollars with twelve places, for people."""
    sign, whole = ("-", -pico) if pico < 0 else ("", pico)
    return f"{sign}{whole // PICO_PER_DOLLAR}.{whole % PICO_PER_DOLLAR:012d}"


def _or(own: int | None, total: int) -> int:
    return total if own is None else own


def _dearest(total: int, own: int | None) -> int:
    return total if own is None else max(total, own)
