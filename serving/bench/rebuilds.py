"""New builds of a Llama, made of its weights: rounded, in another basis, with a low-rank update. To try a check on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["Change", "low_rank", "rebuild", "rotated", "rounded"]

Change = Callable[[Any], None]
"""Changes a causal language model of transformers in place."""
_UPDATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rebuild(model_dir: Path, folder: Path, change: Change) -> Path:
    """Write a copy of a model's folder with changed weights.

    Args:
        model_dir: in transformers' layout.
        folder: does not exist yet.
        change: what is done to the model.
    Returns: ``folder``.
    """
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        change(model)
    model.save_pretrained(str(folder))
    return folder


def rounded(model: Any) -> None:
    """All weights to bfloat16 and back."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())


def low_rank(layers: Sequence[int], *, rank: int, share: float, seed: int) -> Change:
    """A random update of every matrix of some layers, as a LoRA adapter that is merged brings it.

    Args:
        layers: to change.
        rank: of each update.
        share: its Frobenius norm, as a share of the matrix's own.
        seed: of the draw.
    """

    def change(model: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            for name, module in model.model.layers[layer].named_modules():
                if name.rpartition(".")[2] in _UPDATED:
                    rows, columns = module.weight.shape
                    update = torch.randn(rows, rank, generator=generator) @ torch.randn(
                        rank, columns, generator=generator
                    )
                    module.weight.add_(update * (share * module.weight.norm() / update.norm()))

    return change


def rotated(seed: int) -> Change:
    """The residual stream in a random orthogonal basis, folded into the weights: the model computes what it did.

    The weights of the norms are folded into the matrices behind them first.
    """

    def change(model: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = model.config.hidden_size
        basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))

        def read(module: Any, norm: Any) -> None:
            module.weight.copy_((module.weight.double() * norm.weight.double()) @ basis)

        def write(module: Any) -> None:
            module.weight.copy_(basis.T @ module.weight.double())

        inner = model.model
        if model.config.tie_word_embeddings:  # the norm is folded into one of the two
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(inner.embed_tokens.weight.clone())
        inner.embed_tokens.weight.copy_(inner.embed_tokens.weight.double() @ basis)
        for layer in inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
                read(reader, layer.input_layernorm)
            for reader in (mlp.gate_proj, mlp.up_proj):
                read(reader, layer.post_attention_layernorm)
            write(attention.o_proj)
            write(mlp.down_proj)
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
        read(model.lm_head, inner.norm)
        inner.norm.weight.fill_(1.0)

    return change
