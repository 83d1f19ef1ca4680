"""Makes a lens: rows of a model's unembedding, with the final norm's weight folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from probes.errors import TelltaleError

__all__ = ["LensError", "Unembedding", "lens_tensors", "read_unembedding", "token_ids"]

_TOLERANCE = 1e-4


class LensError(TelltaleError, ValueError):
    """No lens can be made for this model or these tokens."""


@dataclass(frozen=True, slots=True)
class Unembedding:
    """How a model makes logits of its last residual stream: ``rows @ stream / rms(stream)``.

    Attributes:
        rows: (vocabulary, d_model) float32, with the final norm's weight and the model's own factor folded in.
        epsilon: of the norm.
    """

    rows: npt.NDArray[np.float32]
    epsilon: float


def token_ids(model_dir: Path, texts: Sequence[str]) -> list[int]:
    """The token of each text.

    Raises:
        LensError: a text is no single token of the model.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.decode([number])) for number in ids)
            raise LensError(
                f"{text!r} is {len(ids)} tokens of this model ({pieces}); a lens reads single ones. Words that begin "
                "with a space often are."
            )
        found.append(int(ids[0]))
    return found


def lens_tensors(model_dir: Path, tokens: Sequence[int], contrast: Sequence[int]) -> dict[str, npt.NDArray[np.float32]]:
    """``tokens``, ``contrast`` and ``epsilon``, as an artifact of kind ``lens`` holds them.

    Args:
        model_dir: folder of the model, in transformers' layout.
        tokens: ids of the first set.
        contrast: ids of the second set.
    Raises:
        LensError: a set is empty, a token stands in both, or the logits are not the unembedding of an RMSNorm.
    """
    both = [*tokens, *contrast]
    if not tokens or not contrast or len(set(both)) != len(both):
        raise LensError(
            f"the sets have {len(tokens)} and {len(contrast)} tokens; each needs one at least, and none may be named "
            "twice."
        )
    found = read_unembedding(model_dir)
    return {
        "tokens": found.rows[list(tokens)],
        "contrast": found.rows[list(contrast)],
        "epsilon": np.array([found.epsilon], dtype=np.float32),
    }


def read_unembedding(model_dir: Path) -> Unembedding:
    """The whole unembedding of a model.

    Args:
        model_dir: folder of the model, in transformers' layout.
    Raises:
        LensError: the logits are not the unembedding of an RMSNorm.
    """
    network = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32, local_files_only=True)
    network.eval()
    head, norm = network.get_output_embeddings(), getattr(network.base_model, "norm", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if (
        not isinstance(norm, torch.nn.Module)
        or not isinstance(epsilon, float)
        or getattr(head, "bias", None) is not None
    ):
        raise LensError(
            f"{type(network).__name__} has no final norm with an epsilon followed by an unembedding without bias. A "
            "lens is made of models that end so (Llama, Mistral, Qwen, SmolLM and the like)."
        )
    width = head.weight.shape[1]
    probe = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) * 3
    with torch.inference_mode():
        # Whatever the norm calls its weight, and whether it adds 1 to it: what it does to ones tells.
        weight = norm(torch.ones(1, width))[0] * (1 + epsilon) ** 0.5
        rms = probe.square().mean(dim=-1, keepdim=True).add(epsilon).sqrt()
        if not torch.allclose(norm(probe), weight * probe / rms, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise LensError(
                f"{type(norm).__name__} is no RMSNorm: its direction depends on more than the row's length."
            )
        rows = head.weight * weight * float(getattr(network.config, "logit_scale", 1.0) or 1.0)
        if getattr(network.config, "final_logit_softcapping", None):
            raise LensError(f"{type(network).__name__} caps its logits: a lens would not give what the model says.")
    return Unembedding(rows.numpy(), epsilon)
