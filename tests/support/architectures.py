"""A tiny random model of every architecture that the registry knows, and what transformers computes in it.

``python -m tests.support.architectures`` writes docs/architectures.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from probes.taps import Site
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model
from serving.engine.layers import KNOWN

D_MODEL = 128
NUM_LAYERS = 3
VOCABULARY = 512
COMMITTED = Path(__file__).parents[2] / "docs" / "architectures.md"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 192,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": D_MODEL,
    "n_layer": NUM_LAYERS,
    "n_head": 4,
    "n_positions": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Recipe:
    """How to write the tiny model, and where transformers has its modules.

    Attributes:
        config: name of the config class in transformers.
        settings: of the config.
        common: settings that most configs share.
        attention: name of the attention module in transformers' layer.
        layers: where transformers' base model has its layers.
        engine: whether the quick tier runs it in a monitored engine as well.
    """

    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=lambda: _COMMON)
    attention: str = "self_attn"
    layers: str = "layers"
    engine: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "LlamaForCausalLM": Recipe("LlamaConfig"),
        "Phi3ForCausalLM": Recipe("Phi3Config"),
        "MistralForCausalLM": Recipe("MistralConfig", {"sliding_window": 16}),
        "Qwen2ForCausalLM": Recipe("Qwen2Config"),
        "Qwen3ForCausalLM": Recipe("Qwen3Config", {"head_dim": 64}),
        "Gemma2ForCausalLM": Recipe(
            "Gemma2Config", {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 24}, engine=True
        ),
        "Gemma3ForCausalLM": Recipe(
            "Gemma3TextConfig",
            {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
        ),
        "GPT2LMHeadModel": Recipe("GPT2Config", common=_GPT2, attention="attn", layers="h", engine=True),
        "GPTNeoXForCausalLM": Recipe("GPTNeoXConfig", {"num_key_value_heads": 4}, attention="attention"),
        "Olmo2ForCausalLM": Recipe("Olmo2Config", engine=True),
        "PhiForCausalLM": Recipe("PhiConfig"),
        "StableLmForCausalLM": Recipe("StableLmConfig", {"use_parallel_residual": False}),
        "CohereForCausalLM": Recipe("CohereConfig", {"logit_scale": 0.25}, engine=True),
        # Its window is one token wider in vLLM than in transformers, on purpose; here no prompt is longer than it.
        # Its own pattern would put the first layer with full attention, beside which readouts are kept, fourth.
        "Cohere2ForCausalLM": Recipe(
            "Cohere2Config",
            {
                "logit_scale": 0.25,
                "sliding_window": 512,
                "head_dim": 32,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
        ),
        "GraniteForCausalLM": Recipe(
            "GraniteConfig",
            {
                "residual_multiplier": 0.35,
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.11,
                "logits_scaling": 4.0,
            },
        ),
        "MiniCPM3ForCausalLM": Recipe(
            "MiniCPM3Config",
            {
                "num_key_value_heads": 4,
                "q_lora_rank": 64,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 32,
                "v_head_dim": 32,
                "scale_depth": 0.7,
                "scale_emb": 3.0,
                "dim_model_base": 64,
            },
        ),
        "MixtralForCausalLM": Recipe("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "Qwen2MoeForCausalLM": Recipe("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 96}),
        "Qwen3MoeForCausalLM": Recipe("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 32}),
        "GptOssForCausalLM": Recipe(
            "GptOssConfig",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 16},
        ),
    }
)


def write_tiny(folder: Path, architecture: str, *, seed: int = 5) -> Path:
    """Write a tiny random model whose norms and biases are random as well; returns its folder."""
    import transformers

    recipe = RECIPES[architecture]
    source = ensure_builtin_model(DEFAULT_MODEL, progress=lambda text: None).path
    path = folder / architecture
    path.mkdir(parents=True)
    for file in source.iterdir():
        if "token" in file.name or file.name in {"vocab.json", "merges.txt"}:
            shutil.copy(file, path / file.name)
    config = getattr(transformers, recipe.config)(**{**recipe.common, **recipe.settings})
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                bias = name.endswith("bias") or "sinks" in name
                spread = torch.rand_like(parameter) - 0.5
                parameter.copy_(0.4 * spread if bias else parameter + spread)
    model.save_pretrained(path)
    return path


def reference(
    path: Path,
    architecture: str,
    tokens: list[int],
    *,
    edit: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[tuple[Site, int], np.ndarray]:
    """What transformers computes at each site of each layer: (tokens, d_model) float64.

    Args:
        path: of the model.
        architecture: its class.
        tokens: to read.
        edit: what happens to the stream behind the first layer.
    """
    import transformers

    recipe = RECIPES[architecture]
    model = getattr(transformers, architecture).from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()  # fmt: skip
    found: dict[tuple[Site, int], np.ndarray] = {}
    layers = model.base_model.get_submodule(recipe.layers)

    def keep(site: Site, number: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            found[site, number] = value.reshape(len(tokens), -1).double().numpy()

        return hook

    def write(_module: object, _inputs: object, output: Any) -> Any:
        assert edit is not None
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    if edit is not None:
        layers[0].register_forward_hook(write)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(keep(Site.RESID_POST, number))
        layer.get_submodule(recipe.attention).register_forward_hook(keep(Site.ATTN_OUT, number))
        layer.mlp.register_forward_hook(keep(Site.MLP_OUT, number))
    with torch.inference_mode():
        states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    # The last of transformers' hidden states is normed; the others are what our definition says.
    for number in range(NUM_LAYERS - 1 if edit is None else 0):
        np.testing.assert_array_equal(found[Site.RESID_POST, number], states[number + 1][0].double().numpy())
    return found


def render() -> str:
    """docs/architectures.md, from the registry and the recipes."""
    lines = [
        "# Architectures",
        "",
        "Written by `python -m tests.support.architectures` from the registry in `serving/engine/layers/known.py` and",
        "the recipes of the tests. A model whose decoder layer is not listed, or whose forward is not the one that was",
        "read, is refused. At every start a numeric check compares what each tap reads with what the next layer takes",
        "(`serving/engine/selfcheck.py`).",
        "",
        f"Sites, for every architecture: {', '.join(f'`{site.value}`' for site in Site)}.",
        "",
        "| architecture | decoder layer | what it returns | tests |",
        "|---|---|---|---|",
    ]
    rows = []
    for name, known in KNOWN.items():
        for architecture in known.architectures:
            tier = "quick" if RECIPES[architecture].engine else "slow"
            tested = f"parity with transformers (quick), monitored engine ({tier})"
            layer = name.rpartition(".")[0].split(".")[-1] + "." + name.split(".")[-1]
            origin = " (transformers)" if name.startswith("transformers.") else ""
            rows.append(f"| {architecture} | `{layer}`{origin} | {known.convention.value} | {tested} |")
    return "\n".join([*lines, *sorted(rows), ""]) + _CONVENTIONS + _refused()


_CONVENTIONS = """
What a layer returns:

* `fused`: `(hidden, residual)`; their sum is the stream.
* `plain`: the stream.
* `alone`: `(stream, None)`.
* `stale`: `(stream, older residual)`; the sum would count the older residual twice.

The tests run on the CPU build with random weights in float32. The published gpt-oss weights are quantised (MXFP4):
nothing has been run with them. Cohere 2 attends one token further back in vLLM than in transformers. With tensor
parallelism Cohere's attention and MLP return partial sums, so that the start-up check refuses `attn_out` and `mlp_out`.

## Refused, with the reason

"""


def _refused() -> str:
    from serving.engine.layers.refused import REFUSED

    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(name)
    return "".join(f"* {', '.join(sorted(names))}: {reason}.\n" for reason, names in by_reason.items())


if __name__ == "__main__":
    COMMITTED.write_text(render())
