"""What vLLM says of its prefix cache: read out of metrics, refused where it is missing, warm or unequal."""

from __future__ import annotations

import pytest

from serving.bench import BenchError
from serving.bench.cache import KVCache, PromptTokens, parse_kv_cache, parse_prompt_tokens
from serving.bench.rounds import require_cached, require_same_cache

COUNTS = """\
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 300.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 84.0
# TYPE vllm:prefix_cache_hits_created gauge
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7e+09
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 500.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="m",source="local_compute"} 20.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 384.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 7.0
"""
CONFIG = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="128",enable_prefix_caching="%s",engine="0",num_gpu_blocks="182"} 1.0
"""
CACHE = KVCache(block_size=128, num_blocks=182, prefix_caching=True)


def test_counts_are_summed_over_engines() -> None:
    assert parse_prompt_tokens(COUNTS) == PromptTokens(computed=520, cached=384, hits=384)


@pytest.mark.parametrize("missing", ["local_compute", "local_cache_hit", "prefix_cache_hits_total"])
def test_a_count_that_is_missing_is_no_zero(missing: str) -> None:
    text = "\n".join(line for line in COUNTS.splitlines() if missing not in line) + "\n"
    with pytest.raises(BenchError, match="lacks"):
        parse_prompt_tokens(text)


def test_what_came_in_between() -> None:
    assert PromptTokens(10, 20, 30).since(PromptTokens(1, 2, 3)) == PromptTokens(9, 18, 27)


def test_the_kv_cache() -> None:
    assert parse_kv_cache(CONFIG % "True") == CACHE
    assert not parse_kv_cache(CONFIG % "False").prefix_caching
    with pytest.raises(BenchError, match="cache_config_info"):
        parse_kv_cache(COUNTS)


def test_servers_must_cache_prefixes_and_have_the_same_cache() -> None:
    assert require_same_cache([], CACHE) == require_same_cache([CACHE], CACHE) == CACHE
    with pytest.raises(BenchError, match="off"):
        require_same_cache([], KVCache(128, 182, prefix_caching=False))
    with pytest.raises(BenchError, match="183"):
        require_same_cache([CACHE], KVCache(128, 183, prefix_caching=True))


def test_a_warm_cache_voids_the_measurement() -> None:
    require_cached(PromptTokens(520, 384, 384), at_most=384, what="a burst")
    with pytest.raises(BenchError, match="385 prompt tokens of a burst"):
        require_cached(PromptTokens(519, 385, 385), at_most=384, what="a burst")
