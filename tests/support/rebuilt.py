"""New builds of a small Llama, made of its weights: in another basis, rounded, shifted, with another template."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Change = Callable[[Any], None]
"""Changes a model of transformers in place."""


def rebuilt(model_dir: Path, folder: Path, change: Change) -> Path:
    """A copy of a model's folder with changed weights."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    with torch.no_grad():
        change(model)
    model.save_pretrained(str(folder))
    return folder


def rotated(seed: int = 0) -> Change:
    """The residual stream in a random orthogonal basis, folded into the weights: the model computes what it did."""

    def change(model: Any) -> None:
        width = model.config.hidden_size
        drawn = np.random.default_rng(seed).standard_normal((width, width))
        basis = torch.tensor(np.linalg.qr(drawn)[0], dtype=torch.float64)

        def read(module: Any, norm: Any) -> None:
            module.weight.copy_((module.weight.double() * norm.weight.double()) @ basis)

        def write(module: Any) -> None:
            module.weight.copy_(basis.T @ module.weight.double())

        inner = model.model
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


def rounded(model: Any) -> None:
    """All weights to bfloat16 and back."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())


def shifted(direction: np.ndarray, size: float) -> Change:
    """Every token's embedding moved along a direction: the stream carries it through all layers."""

    def change(model: Any) -> None:
        step = direction / np.linalg.norm(direction) * size
        model.model.embed_tokens.weight.add_(torch.tensor(step, dtype=torch.float32))

    return change


def retemplated(model_dir: Path, folder: Path, old: str, new: str) -> Path:
    """The same model with another chat template."""
    shutil.copytree(model_dir, folder)
    changed = 0
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and old in path.read_text():
            path.write_text(path.read_text().replace(old, new))
            changed += 1
    assert changed
    return folder
