"""Writes the tables of docs/providers.md from schemas/providers.toml: ``python -m tests.providers_table``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from schemas.providers import KnownPrice, KnownProvider, dated_prices, known_providers

PAGE = Path(__file__).parents[1] / "docs" / "providers.md"
BEGIN, END = "<!-- tables: python -m tests.providers_table -->\n", "<!-- end of tables -->\n"
PREFILLS = {"no": "no", "as-it-is": "as it is", "prefix": '`"prefix": true`', "partial": '`"partial": true`'}


def tables() -> str:
    return "\n".join([*_providers(), "", *_counts(), "", *_prices(), ""])


def written(page: str) -> str:
    head, rest = page.split(BEGIN)
    return head + BEGIN + "\n" + tables() + "\n" + END + rest.split(END)[1]


def _providers() -> Iterator[str]:
    yield "| `provider` | who | address | key | what is particular | continues an answer | prices known |"
    yield "|---|---|---|---|---|---|---|"
    for name, known in known_providers().items():
        who = f"[{known.title}]({known.docs})" if known.docs else known.title
        keys = " or ".join(f"`{variable}`" for variable in known.key_env)
        rows = dated_prices(known)
        prices = f"{sum(len(row.models) for row in rows)} models" if rows else "none"
        yield (
            f"| `{name}` | {who} | {f'`{known.base_url}`' if known.base_url else 'your own'} | {keys} "
            f"| {' '.join(_particular(known)) or '-'} | {_prefill(known)} | {prices} |"
        )


def _particular(known: KnownProvider) -> Iterator[str]:
    if known.wire != "openai":
        yield "Needs `pip install 'penstock[wires]'`."
    if known.key_header != "bearer":
        yield f"The key goes into `{known.key_header}`."
    if known.rate_limits != "unknown":
        yield f"Rate-limit headers as {known_providers()[known.rate_limits].title.partition(',')[0]} names them."
    yield from known.notes


def _prefill(known: KnownProvider) -> str:
    if known.prefill == "unknown":
        return "not known"
    said = f"[{PREFILLS[known.prefill]}]({known.prefill_source})"
    return f"{said} at `{known.prefill_base_url}`" if known.prefill_base_url else said


def _counts() -> Iterator[str]:
    all_ = known_providers().values()
    priced = sum(1 for known in all_ if dated_prices(known))
    models = sum(len(row.models) for known in all_ for row in known.prices)
    yield f"Prices of {models} models are known, at {priced} of {len(all_)} entries; all others are unknown, and told as that."


def _prices() -> Iterator[str]:
    yield "| `provider` | model | input | cached input | output | for prompts up to | checked | source |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, known in known_providers().items():
        for row in known.prices:
            models = ", ".join(f"`{model}`" for model in row.models)
            most = f"{row.prompt_tokens_max:,} tokens" if row.prompt_tokens_max else "any"
            note = f" ({row.note})" if row.note else ""
            yield (
                f"| `{name}` | {models} | {row.input} | {row.cached_input or 'as input'} | {row.output} "
                f"| {most} | {row.checked} | {_source(row)}{note} |"
            )


def _source(row: KnownPrice) -> str:
    said = f"[its page]({row.source})"
    if row.via is None:
        return said
    return (
        f"{said}, as read by `{row.via}`" if row.via.startswith("pkg:") else f"{said}, [as read by others]({row.via})"
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
