"""Models whose residual stream is known not to be where one tap could read it, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_UNREDUCED = (
    "under tensor parallelism its layers return partial sums, and the next layer's norm does the all-reduce: what a "
    "layer returns is not the stream"
)
_SHARDED = (
    "it can split the residual stream's tokens over the ranks (sequence-parallel experts), so that no rank holds every "
    "row"
)
_STREAMS = "it carries several streams at once (hyper-connections or the like): there is no single stream to read"
_ALTUP = "its layers predict and correct several copies of the stream (AltUp): there is no single stream to read"
_SHARED_BLOCK = "its shared attention blocks read the embeddings beside the stream and feed state-space layers"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "DeepseekV32ForCausalLM",
                "Dots3NoteForCausalLM",
                "MiniMaxM3SparseForCausalLM",
                "MiniMaxM3SparseForConditionalGeneration",
            ),
            _UNREDUCED,
        ),
        **dict.fromkeys(
            (
                "DeepseekForCausalLM",
                "DeepseekV2ForCausalLM",
                "DeepseekV3ForCausalLM",
                "InternS2MobiusForConditionalGeneration",
                "Qwen3NextForCausalLM",
            ),
            _SHARDED,
        ),
        **dict.fromkeys(
            (
                "DeepseekV4ForCausalLM",
                "DeepseekV4ForConditionalGeneration",
                "DeepseekV41ForCausalLM",
                "Glm5NextForCausalLM",
                "Glm5NextForConditionalGeneration",
                "HYV4ForCausalLM",
                "InklingForCausalLM",
                "InklingForConditionalGeneration",
                "KimiK3ForConditionalGeneration",
                "Qwen4ExpForCausalLM",
                "Qwen4ExpForConditionalGeneration",
            ),
            _STREAMS,
        ),
        **dict.fromkeys(("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"), _ALTUP),
        "Zamba2ForCausalLM": _SHARED_BLOCK,
    }
)
"""Architectures by name, as a model's config states them."""
