"""vLLM's own numbers, out of the text of its /metrics; pure.

Names and labels have changed between its releases: what isn't there is not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlencode

from schemas.jobs import EngineStats

TOKENS_A_SLOT = 2048  # of the cache, for a request as they mostly are; the engine itself lets those wait that don't fit
SEQUENCES_MAX = 256  # --max-num-seqs where nobody says otherwise: vLLM's own default on most machines

_PREFIX = "vllm:"
_LINE = re.compile(rf"^{_PREFIX}(\w+)(?:\{{(.*)\}})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_USED = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
_ASKED = ("prefix_cache_queries_total", "gpu_prefix_cache_queries_total")
_FOUND = ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total")
_RUNNING, _WAITING, _CACHE = "num_requests_running", "num_requests_waiting", "cache_config_info"
_NAMES = (_RUNNING, _WAITING, _CACHE, *_USED, *_ASKED, *_FOUND)

# To write out everything that it counts takes a vLLM 6 to 8 ms, in which its front end hands on no token; these names, 0.5.
# Its exporter chooses by name only behind the slash.
METRICS_PATHS = (f"/metrics/?{urlencode([('name[]', _PREFIX + name) for name in _NAMES])}", "/metrics")

Values = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Numbers:
    """*cache_tokens* is how many tokens' keys and values there is memory for. With data parallelism: of all engines."""

    stats: EngineStats
    cache_tokens: int | None = None


def read(text: str) -> Numbers | None:
    """None if these are no numbers of a vLLM's."""
    values: Values = {}
    cache_tokens: int | None = None
    for name, labels, value in _LINE.findall(text):
        if name == _CACHE:
            tokens = _cache_tokens(dict(_LABEL.findall(labels)))
            cache_tokens = tokens if tokens is None else tokens + (cache_tokens or 0)
        elif (number := _float(value)) is not None:
            values.setdefault(name, []).append(number)
    if _RUNNING not in values:
        return None
    asked, found = _first(values, _ASKED), _first(values, _FOUND)
    used = _first(values, _USED)
    stats = EngineStats(
        running=int(sum(values[_RUNNING])),
        waiting=int(sum(values.get(_WAITING, ()))),
        cache_used=max(used) if used else None,
        prefix_asked=int(sum(asked)) if asked else None,
        prefix_found=int(sum(found)) if found else None,
    )
    return Numbers(stats, cache_tokens)


def room(cache_tokens: int | None, *, context_tokens: int | None, sequences_max: int) -> int:
    """How many requests the engine has room for at once."""
    if cache_tokens is None:
        return sequences_max
    return max(1, min(sequences_max, cache_tokens // min(TOKENS_A_SLOT, context_tokens or TOKENS_A_SLOT)))


def _cache_tokens(config: dict[str, str]) -> int | None:
    """As it says; else, before it said so itself, by its blocks."""
    said = config.get("kv_cache_size_tokens", "")
    blocks, size = config.get("num_gpu_blocks", ""), config.get("block_size", "")
    if said.isdecimal():
        return int(said)
    return int(blocks) * int(size) if blocks.isdecimal() and size.isdecimal() else None


def _first(values: Values, names: tuple[str, ...]) -> list[float]:
    return next((values[name] for name in names if name in values), [])


def _float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
