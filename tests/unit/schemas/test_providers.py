from __future__ import annotations

import tomllib
from decimal import Decimal

import msgspec
import pytest

from schemas.money import UNKNOWN, Price, Usage, cost
from schemas.providers import dated_prices, known_at, known_price, known_providers, read_providers

ROW = """
[p]
title = "P"
key_env = ["P_API_KEY"]
base_url = "https://p.example/v1"
[[p.prices]]
models = ["m"]
input = "0.15"
cached_input = "0.075"
output = "0.6"
checked = "2026-01-31"
source = "https://p.example/pricing"
"""


def test_the_table_is_read_and_has_the_providers_that_people_ask_for() -> None:
    wanted = {"openai", "anthropic", "google", "groq", "mistral", "deepseek", "together", "openrouter", "azure", "xai"}
    wanted |= {
        "fireworks",
        "cerebras",
        "cohere",
        "nebius",
        "deepinfra",
        "sambanova",
        "hyperbolic",
        "nvidia",
    }
    wanted |= {"moonshot", "zai", "dashscope"}
    assert wanted <= known_providers().keys()


def test_openai_comes_first_since_the_order_is_the_rank() -> None:
    assert next(iter(known_providers())) == "openai"


def test_a_price_becomes_whole_micro_dollars() -> None:
    assert known_price(read_providers(ROW)["p"], "m") == Price(input=150_000, cached_input=75_000, output=600_000)


def test_every_price_of_the_table_is_exact_and_dated_and_says_where_it_was_read() -> None:
    rows = [(name, row) for name, known in known_providers().items() for row in known.prices]
    assert len(rows) > 50
    for name, row in rows:
        price = row.price()
        assert Decimal(price.input) == Decimal(row.input) * 1_000_000, (name, row.models)
        assert price.output > 0
        assert row.cached_input is None or Decimal(row.cached_input) <= Decimal(row.input)
        assert row.source.startswith("https://")


def test_a_provider_without_prices_says_why() -> None:
    silent = {name: known for name, known in known_providers().items() if not dated_prices(known)}
    assert silent.keys() == {"openrouter", "hyperbolic", "nvidia", "azure"}
    assert all("price" in " ".join(known.notes) or "charged" in " ".join(known.notes) for known in silent.values())


def test_a_price_that_is_not_known_is_none_and_not_zero() -> None:
    assert known_price(known_providers()["together"], "meta-llama/Llama-3.3-70B-Instruct-Turbo") is None
    assert known_price(known_providers()["openai"], "gpt-99") is None


def test_the_compatible_endpoint_has_the_prices_of_the_own_wire() -> None:
    known = known_providers()
    assert dated_prices(known["anthropic-compatible"]) == known["anthropic"].prices != ()


def test_what_a_list_of_models_puts_before_a_name_does_not_hide_its_price() -> None:
    google = known_providers()["google-compatible"]
    assert known_price(google, "models/gemini-2.5-flash") == known_price(google, "gemini-2.5-flash") is not None


def test_a_provider_is_found_by_its_address_with_and_without_the_slash() -> None:
    assert known_at("https://api.groq.com/openai/v1/") is known_providers()["groq"]
    assert known_at("https://api.groq.com.evil.example/openai/v1") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('"0.15"', "0.15"), "prices"),  # a float is not exact
        (('"0.15"', '"0.00000015"'), "whole micro-dollars"),
        (('"0.15"', '"-1"'), "zero or more"),
        (('"2026-01-31"', '"January"'), "neither a day nor a month"),
        (("https://p.example/pricing", "http://p.example/pricing"), "not an https address"),
        (('/pricing"', '/pricing"\nvia = "pkg:pypi/prices"'), "not an https address"),  # which release?
        (('"P_API_KEY"', '"p-key"'), "no environment variable"),
        (('title = "P"', 'title = "P"\nprefil = "no"'), "prefil"),
        (('title = "P"', 'title = "P"\nprefill = "perhaps"'), "perhaps"),
        (('title = "P"', 'title = "P"\nprefill = "no"'), "prefill_source"),
        (('title = "P"', 'title = "P"\nrate_limits = "no"'), "rate_limits"),
        (('title = "P"', 'title = "P"\nprices_of = "q"'), "prices_of"),
        (('["m"]', '["m", "m"]\n[[p.prices]]\nmodels=["m"]'), "missing required field"),
        (('["m"]', "[]"), "of nothing"),
    ],
)
def test_a_mistake_in_the_table_is_an_error_that_names_it(change: tuple[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=f"^provider 'p': .*{says}"):
        read_providers(ROW.replace(*change))


def test_a_price_stated_twice_is_an_error() -> None:
    twice = ROW + ROW[ROW.index("[[") :]
    tomllib.loads(twice)
    with pytest.raises(ValueError, match="twice"):
        read_providers(twice)


def test_a_known_price_travels_as_it_always_did_and_an_unknown_one_says_so() -> None:
    assert msgspec.json.encode(Price(input=1, output=2)) == b'{"input":1,"output":2}'
    assert msgspec.json.encode(UNKNOWN) == b'{"unknown":true}'
    assert cost(Usage(prompt_tokens=5, completion_tokens=5), UNKNOWN) == 0
