"""The operator that picks: whole rows of the residual stream, a few of a step, copied into a small persistent buffer.

What it costs does not depend on the step: as many rows as the buffer has are copied, whether anybody asked for them or
not. A ``torch.library`` operator like the one that reads, so that it survives compilation and CUDA graphs.
"""

from __future__ import annotations

from typing import Final

import torch

from serving.engine.ops import stream_of

PICK_VERSION: Final = 1
"""Part of vLLM's compile-cache key: raise it whenever the operator's meaning changes."""


def pick_rows(hidden: torch.Tensor, residual: torch.Tensor | None, index: torch.Tensor, picked: torch.Tensor) -> None:
    """Copy some rows of a step.

    Args:
        hidden: (n, d_model), any float dtype; n is at least 1.
        residual: (n, d_model) to be added to it, or None where ``hidden`` is the stream already.
        index: (k,) int64, which rows; what lies beyond the last one stands for the last one.
        picked: (k, d_model) float32; gets the stream at those rows.
    """
    place = index.clamp(0, hidden.shape[0] - 1)
    some = None if residual is None else residual.index_select(0, place)
    picked.copy_(stream_of(hidden.index_select(0, place), some))


pick = torch.library.custom_op("telltale::pick", pick_rows, mutates_args=("picked",))
"""``pick_rows`` as an operator. Eager forwards call the function."""


@pick.register_fake
def _(hidden: torch.Tensor, residual: torch.Tensor | None, index: torch.Tensor, picked: torch.Tensor) -> None:
    """Nothing is returned, so there is no shape to infer."""
