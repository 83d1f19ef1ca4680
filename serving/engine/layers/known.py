"""The decoder-layer classes that were read. To add one: read its forward, fill in an entry, add a parity test.

The parity tests (tests/engine/test_architectures.py) take a recipe for a tiny model of each architecture from
tests/support/architectures.py, and docs/architectures.md is written from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from serving.engine.layers.convention import Convention, LayerClass

_post_normed = partial(LayerClass, attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")


def _granite(layer: Any) -> float:
    return float(layer.residual_multiplier)


def _minicpm(layer: Any) -> float:
    return float(layer.config.scale_depth / math.sqrt(layer.config.num_hidden_layers))


KNOWN: Mapping[str, LayerClass] = MappingProxyType(
    {
        "vllm.model_executor.models.llama.LlamaDecoderLayer": LayerClass(
            Convention.FUSED, "ab84e40134637a42", ("LlamaForCausalLM", "Phi3ForCausalLM")
        ),
        "vllm.model_executor.models.mistral.MistralDecoderLayer": LayerClass(
            Convention.FUSED, "3e31c233b1d1f69b", ("MistralForCausalLM",)
        ),
        "vllm.model_executor.models.qwen2.Qwen2DecoderLayer": LayerClass(
            Convention.FUSED, "2dbae90ca479be51", ("Qwen2ForCausalLM",)
        ),
        "vllm.model_executor.models.qwen3.Qwen3DecoderLayer": LayerClass(
            Convention.FUSED, "2dbae90ca479be51", ("Qwen3ForCausalLM",)
        ),
        "vllm.model_executor.models.qwen2_moe.Qwen2MoeDecoderLayer": LayerClass(
            Convention.FUSED, "c25895061e0d5dd0", ("Qwen2MoeForCausalLM",)
        ),
        "vllm.model_executor.models.qwen3_moe.Qwen3MoeDecoderLayer": LayerClass(
            Convention.FUSED, "2dbae90ca479be51", ("Qwen3MoeForCausalLM",)
        ),
        "vllm.model_executor.models.mixtral.MixtralDecoderLayer": LayerClass(
            Convention.FUSED, "be19887993749b3c", ("MixtralForCausalLM",), mlp="block_sparse_moe"
        ),
        # The norms that follow attention and MLP stand inside the layer, before the sum: hidden is what is added.
        "vllm.model_executor.models.gemma2.Gemma2DecoderLayer": _post_normed(
            Convention.FUSED, "6c687c15fb71e768", ("Gemma2ForCausalLM",)
        ),
        "vllm.model_executor.models.gemma3.Gemma3DecoderLayer": _post_normed(
            Convention.FUSED, "3563fea051637315", ("Gemma3ForCausalLM",)
        ),
        "vllm.model_executor.models.gpt_oss.TransformerBlock": LayerClass(
            Convention.FUSED, "23a11bebdf05740f", ("GptOssForCausalLM",), attention="attn"
        ),
        "vllm.model_executor.models.gpt2.GPT2Block": LayerClass(
            Convention.PLAIN,
            "1836c1d9149d3943",
            ("GPT2LMHeadModel",),
            attention="attn",
            first="ln_1",
            layers="transformer.h",
            final_norm="transformer.ln_f",
        ),
        "vllm.model_executor.models.granite.GraniteDecoderLayer": LayerClass(
            Convention.PLAIN, "c71ac7664244f218", ("GraniteForCausalLM",), multiplier=_granite
        ),
        "vllm.model_executor.models.minicpm3.MiniCPM3DecoderLayer": LayerClass(
            Convention.ALONE, "a949af20ab9410e5", ("MiniCPM3ForCausalLM",), multiplier=_minicpm
        ),
        # These return the stream, and beside it the stream before their last block: the sum would count that twice.
        "vllm.model_executor.models.stablelm.StablelmDecoderLayer": LayerClass(
            Convention.STALE, "7f577f03379703a4", ("StableLmForCausalLM",)
        ),
        "vllm.model_executor.models.commandr.CohereDecoderLayer": LayerClass(
            Convention.STALE, "3e0dcd9efe8608fd", ("Cohere2ForCausalLM", "CohereForCausalLM")
        ),
        # vLLM runs these with transformers' own layers, whose tensors have a batch dimension of one in front.
        "transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer": LayerClass(
            Convention.PLAIN,
            "ecc57fd92546e387",
            ("GPTNeoXForCausalLM",),
            attention="attention",
            final_norm="model.final_layer_norm",
        ),
        "transformers.models.olmo2.modeling_olmo2.Olmo2DecoderLayer": _post_normed(
            Convention.PLAIN, "5ea4f52ef486840d", ("Olmo2ForCausalLM",), first="self_attn"
        ),
        "transformers.models.phi.modeling_phi.PhiDecoderLayer": LayerClass(
            Convention.PLAIN, "a47469f06cbba345", ("PhiForCausalLM",), final_norm="model.final_layernorm"
        ),
    }
)
