"""The providers that are known by name: schemas/providers.toml, checked.

It is the one list of them. Settings take addresses, names of keys and prices from it; workers take habits. What a route says
itself comes before what the table says.
Source: docs/adr/0043-known-providers.md
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Literal

import msgspec
from msgspec import Struct

from schemas.money import Price, micro_per_million

Wire = Literal["openai", "anthropic", "gemini"]
Prefill = Literal["unknown", "no", "as-it-is", "prefix", "partial"]

_DAY = re.compile(r"20\d\d-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?")
_ENVIRON = re.compile(r"[A-Z][A-Z0-9_]*")
_PACKAGE = re.compile(r"pkg:[a-z]+/(?:[^/@]+/)?[^/@]+@[^/@]+")  # https://github.com/package-url/purl-spec


class KnownPrice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What *models* cost: exact decimals, US dollars per million tokens."""

    models: tuple[str, ...]
    input: str
    output: str
    cached_input: str | None = None  # not stated: as input
    prompt_tokens_max: int | None = None  # longer prompts cost more, which a `Price` can't say
    checked: str  # the day, or the month, on which `source` said so
    source: str  # the provider's own page
    via: str | None = None  # who read it there, if it wasn't us: a page, or a package by its package URL
    note: str | None = None

    def price(self) -> Price:
        """The same as whole micro-dollars. Raises: ValueError."""
        cached = None if self.cached_input is None else micro_per_million(self.cached_input)
        return Price(input=micro_per_million(self.input), output=micro_per_million(self.output), cached_input=cached)


class RateLimitHeaders(Struct, frozen=True, kw_only=True):
    """The names of the headers that tell what is left; None where the provider has no such header."""

    requests_limit: str | None = None
    requests_remaining: str | None = None
    requests_reset: str | None = None
    tokens_limit: str | None = None
    tokens_remaining: str | None = None
    tokens_reset: str | None = None


NO_HEADERS = RateLimitHeaders()

# By the table's `rate_limits`. Where they were found: the pages on rate limits of Anthropic, Groq, Cerebras and Fireworks;
# clients of Mistral's.
RATE_LIMITS = {
    "openai": RateLimitHeaders(
        requests_limit="x-ratelimit-limit-requests",
        requests_remaining="x-ratelimit-remaining-requests",
        requests_reset="x-ratelimit-reset-requests",
        tokens_limit="x-ratelimit-limit-tokens",
        tokens_remaining="x-ratelimit-remaining-tokens",
        tokens_reset="x-ratelimit-reset-tokens",
    ),
    "mistral": RateLimitHeaders(
        requests_limit="x-ratelimit-limit-req-minute",
        requests_remaining="x-ratelimit-remaining-req-minute",
        tokens_limit="x-ratelimit-limit-tokens-minute",
        tokens_remaining="x-ratelimit-remaining-tokens-minute",
    ),
    "cerebras": RateLimitHeaders(  # requests are told by the day
        tokens_limit="x-ratelimit-limit-tokens-minute",
        tokens_remaining="x-ratelimit-remaining-tokens-minute",
        tokens_reset="x-ratelimit-reset-tokens-minute",
    ),
    "anthropic": RateLimitHeaders(  # of its several counts of tokens, the one that is nearest to its end
        requests_limit="anthropic-ratelimit-requests-limit",
        requests_remaining="anthropic-ratelimit-requests-remaining",
        requests_reset="anthropic-ratelimit-requests-reset",
        tokens_limit="anthropic-ratelimit-tokens-limit",
        tokens_remaining="anthropic-ratelimit-tokens-remaining",
        tokens_reset="anthropic-ratelimit-tokens-reset",
    ),
    "fireworks": RateLimitHeaders(tokens_limit="x-ratelimit-limit-tokens-prompt"),
    "unknown": NO_HEADERS,
}


class KnownProvider(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One provider. The defaults are what OpenAI does."""

    title: str
    key_env: tuple[str, ...]  # the environment variables that its key is in; the first one that is set counts
    wire: Wire = "openai"  # another one is spoken by a library: see workers/providers/any_llm.py
    base_url: str | None = None  # None: each account has an address of its own
    base_url_env: str | None = None  # an environment variable that moves it
    docs: str | None = None
    key_header: Literal["bearer", "api-key"] = "bearer"
    optional_headers: tuple[str, ...] = ()  # that it understands, and nobody needs
    takes_stream_options: bool = True  # False: it refuses them, and tells the usage of a stream anyway
    reasoning_apart: bool = False  # its completion_tokens are without the reasoning_tokens
    model_prefix: str = ""  # what its list of models puts before each name
    prefill: Prefill = "unknown"  # whether it continues a last assistant message, and by which mark on that
    prefill_base_url: str | None = None  # where it does, if only there
    prefill_source: str | None = None
    rate_limits: str = "unknown"  # the key into RATE_LIMITS
    prices_of: str | None = None  # the provider whose prices these are too
    prices: tuple[KnownPrice, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rate_limit_headers(self) -> RateLimitHeaders:
        return RATE_LIMITS[self.rate_limits]


@cache
def known_providers() -> dict[str, KnownProvider]:
    """By name, in the table's order."""
    text = resources.files("schemas").joinpath("providers.toml").read_text(encoding="utf-8")
    return read_providers(text)


def read_providers(text: str) -> dict[str, KnownProvider]:
    """The table *text*.

    Raises: ValueError that names the provider and what is wrong with it.
    """
    table = tomllib.loads(text)
    found: dict[str, KnownProvider] = {}
    for name, raw in table.items():
        try:
            found[name] = msgspec.convert(raw, KnownProvider)
            _check(found[name], table)
        except ValueError as error:  # msgspec's errors are some too
            raise ValueError(f"provider {name!r}: {error}") from error
    return found


def known_at(base_url: str) -> KnownProvider | None:
    """The known provider whose OpenAI-compatible API is at *base_url*."""
    for provider in known_providers().values():
        if provider.wire == "openai" and provider.base_url is not None and same_address(provider.base_url, base_url):
            return provider
    return None


def known_price(provider: KnownProvider, model: str) -> Price | None:
    """What *provider* charges for what it calls *model*; None if that isn't known."""
    return _prices(provider).get(model.removeprefix(provider.model_prefix))


def dated_prices(provider: KnownProvider) -> tuple[KnownPrice, ...]:
    """The rows behind `known_price`."""
    return provider.prices if provider.prices_of is None else known_providers()[provider.prices_of].prices


@cache
def _prices(provider: KnownProvider) -> dict[str, Price]:
    return {model: row.price() for row in dated_prices(provider) for model in row.models}


def same_address(one: str, other: str) -> bool:
    return one.rstrip("/").lower() == other.rstrip("/").lower()


def _check(provider: KnownProvider, table: dict[str, object]) -> None:
    """What types can't say. Raises: ValueError."""
    for variable in (*provider.key_env, provider.base_url_env or "X"):
        if _ENVIRON.fullmatch(variable) is None:
            raise ValueError(f"{variable!r} is no environment variable")
    pages = [provider.docs, provider.base_url, provider.prefill_base_url, provider.prefill_source]
    pages += [row.source for row in provider.prices]
    pages += [row.via for row in provider.prices if row.via is not None and _PACKAGE.fullmatch(row.via) is None]
    for page in pages:
        if page is not None and not page.startswith("https://"):
            raise ValueError(f"{page!r} is not an https address, nor a package with its version")
    if provider.prefill != "unknown" and provider.prefill_source is None:
        raise ValueError("prefill needs a prefill_source")
    if provider.rate_limits not in RATE_LIMITS:
        raise ValueError(f"rate_limits {provider.rate_limits!r} is none of {', '.join(RATE_LIMITS)}")
    if provider.prices_of is not None and (provider.prices or provider.prices_of not in table):
        raise ValueError("prices_of names another provider, and then there are no prices")
    named: set[str] = set()
    for row in provider.prices:
        row.price()
        if not row.models or not named.isdisjoint(row.models):
            raise ValueError(f"the price of {', '.join(row.models) or 'nothing'} is stated twice, or of nothing")
        if _DAY.fullmatch(row.checked) is None:
            raise ValueError(f"{row.checked!r} is neither a day nor a month")
        named.update(row.models)
