"""Texts as vectors, for the text-only peers of a detector: no activation of the served model takes part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from probes.fit.controls import Control

__all__ = ["InputEmbeddings"]

Float32 = npt.NDArray[np.float32]


class InputEmbeddings:
    """The mean of a model's input embeddings over a text's tokens: its words, without their order or context.

    Args:
        model_dir: folder in transformers' layout.
    """

    control = Control.BAG_OF_EMBEDDINGS

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        network = AutoModel.from_pretrained(str(model_dir), dtype=torch.float32, local_files_only=True)
        self._table: Float32 = network.get_input_embeddings().weight.detach().numpy()

    def encode(self, texts: Sequence[str]) -> Float32:
        """(texts, d_model); zeros for a text without tokens."""
        rows = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = self._table.shape[1]
        return np.stack([self._table[row].mean(axis=0) if row else np.zeros(width, np.float32) for row in rows])
