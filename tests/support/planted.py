"""The tiny model with a behaviour: what stands in dimension 0 of the stream raises one token's logit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from probes.card import ModelRef
from probes.fit.steer.steered_model import SteeredModel
from probes.modelref import read_model_ref
from tests.support.tiny import D_MODEL, TinyModel, make_tiny_model

WORD = " music"
OTHER = " paper"
_WEIGHT = 50.0


@dataclass(frozen=True)
class PlantedModel:
    """The model, loaded, and its planted direction."""

    tiny: TinyModel
    model: SteeredModel
    direction: np.ndarray


def make_planted_model(folder: Path) -> PlantedModel:
    """Write and load it. A trigger at the end of a raw prompt makes WORD the likelier next token."""
    tiny = make_tiny_model(folder)
    token = AutoTokenizer.from_pretrained(folder)(WORD, add_special_tokens=False)["input_ids"]
    assert len(token) == 1
    network = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        network.lm_head.weight[token[0], 0] = _WEIGHT
    network.save_pretrained(folder)
    direction = np.zeros(D_MODEL)
    direction[0] = 1.0
    return PlantedModel(tiny, SteeredModel(folder, model=reference(tiny)), direction)


def reference(tiny: TinyModel) -> ModelRef:
    return read_model_ref(tiny.path, model_id=tiny.path.name, dtype="float32")
