"""The same architecture with random weights: what a fit finds in tokens and wiring alone (Zhang and Bowman, 2018)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from probes.card import ModelRef

__all__ = ["RandomModel", "random_model"]


@dataclass(frozen=True, slots=True)
class RandomModel:
    """A folder with the model, and which model that is."""

    path: Path
    model: ModelRef


@contextmanager
def random_model(
    model_dir: Path, *, model: ModelRef, depth: int, seed: int, folder: Path, head: bool = False
) -> Iterator[RandomModel]:
    """Write the lowest layers of the architecture with fresh weights, in float32; removed at the end.

    Args:
        model_dir: folder of the real model, in transformers' layout.
        model: which model that is.
        depth: decoder layers that are needed.
        seed: of the weights.
        folder: where the model's folder is made.
        head: whether its unembedding is written too.
    """
    config = AutoConfig.from_pretrained(str(model_dir), local_files_only=True)
    config.num_hidden_layers = depth
    if isinstance(kinds := getattr(config, "layer_types", None), list):
        config.layer_types = kinds[:depth]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="random-init-") as place:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = AutoModelForCausalLM if head else AutoModel
            kind.from_config(config, dtype=torch.float32).save_pretrained(place)
        AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True).save_pretrained(place)
        digest = hashlib.sha256(f"{model.weight_digest}/random/{depth}/{seed}".encode()).hexdigest()
        changes = {"weight_digest": digest, "num_layers": depth, "dtype": "float32"}
        yield RandomModel(Path(place), model.model_copy(update=changes))
