"""What vLLM itself says of its prefix cache, in both servers: prompt tokens computed and not. Reads /metrics."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serving.bench import BenchError

_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_HITS = "vllm:prefix_cache_hits_total"
_CONFIG = "vllm:cache_config_info"


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Counts since the start of a server.

    Attributes:
        computed: prompt tokens that went through the model (``vllm:prompt_tokens_by_source``, ``local_compute``).
        cached: prompt tokens that did not (``local_cache_hit``).
        hits: tokens that vLLM's prefix cache found (``vllm:prefix_cache_hits``).
    """

    computed: int
    cached: int
    hits: int

    def since(self, before: PromptTokens) -> PromptTokens:
        """What came in between."""
        return PromptTokens(self.computed - before.computed, self.cached - before.cached, self.hits - before.hits)


@dataclass(frozen=True, slots=True)
class KVCache:
    """A server's KV cache.

    Attributes:
        block_size: tokens in a block.
        num_blocks: in all.
        prefix_caching: whether blocks are shared between requests.
    """

    block_size: int
    num_blocks: int
    prefix_caching: bool


def read_prompt_tokens(url: str) -> PromptTokens:
    """The counts of a server.

    Raises:
        BenchError: it does not export them.
        httpx.HTTPError: it does not answer.
    """
    return parse_prompt_tokens(_metrics(url))


def read_kv_cache(url: str) -> KVCache:
    """A server's KV cache; errors as for ``read_prompt_tokens``."""
    return parse_kv_cache(_metrics(url))


def parse_prompt_tokens(text: str) -> PromptTokens:
    """Take the counts out of a server's metrics, summed over its engines.

    Raises:
        BenchError: they are not there.
    """
    totals: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in {_BY_SOURCE, _HITS}:
                key = sample.name, sample.labels.get("source", "")
                totals[key] = totals.get(key, 0.0) + sample.value
    try:
        return PromptTokens(
            computed=int(totals[_BY_SOURCE, "local_compute"]),
            cached=int(totals[_BY_SOURCE, "local_cache_hit"]),
            hits=int(totals[_HITS, ""]),
        )
    except KeyError as error:
        raise BenchError(
            f"the server's /metrics lacks {error}: whether a prefix was computed once cannot be shown. "
            "Measure with a supported version of vLLM: telltale doctor."
        ) from error


def parse_kv_cache(text: str) -> KVCache:
    """Take the KV cache out of a server's metrics.

    Raises:
        BenchError: it is not there.
    """
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == _CONFIG:
                labels = sample.labels
                return KVCache(
                    block_size=int(labels["block_size"]),
                    num_blocks=int(labels["num_gpu_blocks"]),
                    prefix_caching=labels["enable_prefix_caching"] == "True",
                )
    raise BenchError(f"the server's /metrics lacks {_CONFIG}. Measure with a supported version of vLLM.")


def _metrics(url: str) -> str:
    response = httpx.get(f"{url}/metrics", timeout=30.0, trust_env=False)
    response.raise_for_status()
    return response.text
