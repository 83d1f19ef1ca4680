"""Which next tokens a latent speaks for: its decoder row through the model's unembedding (logit lens)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["OutputTokens", "output_tokens"]

_LATENTS_AT_ONCE = 128
"""Logits of so many latents are held at a time: 25 MB with 49,152 tokens."""

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """Ids of the tokens whose logits a latent raises or lowers most.

    Attributes:
        promoted: most raised first.
        suppressed: most lowered first.
    """

    promoted: tuple[int, ...]
    suppressed: tuple[int, ...]


def output_tokens(decoder: Float32, unembedding: Float32, *, count: int) -> Iterator[OutputTokens]:
    """Of each latent, in order.

    What the layers above make of the row is left out, and the final norm divides all logits by the same number. So
    this is an order of tokens, no size.

    Args:
        decoder: (width, d_model).
        unembedding: (vocabulary, d_model), with the final norm's weight folded in.
        count: tokens of each kind; fewer where half of the vocabulary is less.
    """
    count = min(count, len(unembedding) // 2)
    for start in range(0, len(decoder), _LATENTS_AT_ONCE):
        logits = decoder[start : start + _LATENTS_AT_ONCE] @ unembedding.T
        for row in logits:
            ends = np.concatenate([np.argpartition(row, -count)[-count:], np.argpartition(row, count)[:count]])
            order = ends[np.argsort(row[ends], kind="stable")]
            yield OutputTokens(
                tuple(int(token) for token in order[::-1][:count]), tuple(int(token) for token in order[:count])
            )
