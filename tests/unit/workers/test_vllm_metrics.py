"""What a vLLM's /metrics says, and what follows for its slots."""

from __future__ import annotations

import pytest

from schemas.jobs import EngineStats
from workers.providers.vllm_metrics import SEQUENCES_MAX, TOKENS_A_SLOT, Numbers, read, room

# Recorded from vLLM 0.32, shortened.
OF_0_32 = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.125
vllm:prefix_cache_queries_total{engine="0",model_name="tiny"} 1024.0
vllm:prefix_cache_queries_created{engine="0",model_name="tiny"} 1.7952606607910817e+09
vllm:prefix_cache_hits_total{engine="0",model_name="tiny"} 256.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="tiny"} 0.0
vllm:cache_config_info{block_size="128",engine="0",kv_cache_dtype_skip_layers="[]",kv_cache_max_concurrency="16.0",\
kv_cache_memory_bytes="67108864",kv_cache_size_tokens="131072",num_gpu_blocks="1024",sliding_window="None"} 1.0
http_request_duration_highr_seconds_created 1.795260661357988e+09
"""
OLDER = """\
vllm:num_requests_running{model_name="m"} 1.0
vllm:num_requests_waiting{model_name="m"} 0.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.5
vllm:gpu_prefix_cache_queries_total{model_name="m"} 10.0
vllm:gpu_prefix_cache_hits_total{model_name="m"} 5.0
vllm:cache_config_info{block_size="16",num_gpu_blocks="1000",swap_space="4"} 1.0
"""


def test_the_numbers_are_read() -> None:
    stats = EngineStats(running=3, waiting=2, cache_used=0.125, prefix_asked=1024, prefix_found=256)
    assert read(OF_0_32) == Numbers(stats, cache_tokens=131072)


def test_older_names_are_read() -> None:
    stats = EngineStats(running=1, waiting=0, cache_used=0.5, prefix_asked=10, prefix_found=5)
    assert read(OLDER) == Numbers(stats, cache_tokens=16000)


def test_engines_beside_each_other_are_added_up() -> None:
    """Data parallelism: one front end, several engines. Of how full they are, the fullest counts."""
    second = OF_0_32.replace('engine="0"', 'engine="1"').replace("0.125", "0.75")
    stats = EngineStats(running=6, waiting=4, cache_used=0.75, prefix_asked=2048, prefix_found=512)
    assert read(OF_0_32 + second) == Numbers(stats, cache_tokens=262144)


@pytest.mark.parametrize(
    "text", ["", "<html></html>", "process_open_fds 12\n", "vllm:num_requests_running{} nonsense\n"]
)
def test_what_is_no_vllms_is_nothing(text: str) -> None:
    assert read(text) is None


def test_a_number_that_can_not_be_is_not_known() -> None:
    numbers = read(
        'vllm:num_requests_running 1.0\nvllm:kv_cache_usage_perc{a="b"} NaN\nvllm:prefix_cache_hits_total -1\n'
    )
    assert numbers == Numbers(EngineStats(running=1, waiting=0), cache_tokens=None)


@pytest.mark.parametrize(
    ("cache_tokens", "context_tokens", "sequences_max", "slots"),
    [
        (None, 4096, 256, 256),
        (131072, 8192, 256, 131072 // TOKENS_A_SLOT),
        (131072, 512, SEQUENCES_MAX, 256),
        (131072, 512, 16, 16),
        (131072, None, 256, 131072 // TOKENS_A_SLOT),
        (100, 8192, 256, 1),
    ],
)
def test_slots_are_what_the_cache_and_the_scheduler_have_room_for(
    cache_tokens: int | None, context_tokens: int | None, sequences_max: int, slots: int
) -> None:
    assert room(cache_tokens, context_tokens=context_tokens, sequences_max=sequences_max) == slots
