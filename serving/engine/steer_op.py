"""The steer operator: ``h += c w`` on the rows that a step is to write to, and how far each was moved.

It knows neither requests nor policies: whose rows are written to, and how much, stands in a small buffer that is
filled before the step. A ``torch.library`` operator like the one that reads, so that it survives compilation and CUDA
graphs. It returns a new tensor, in which every row that is not written to is bit for bit what it was.
"""

from __future__ import annotations

from typing import Final

import torch

from serving.engine.ops import stream_of, true_float32

STEER_VERSION: Final = 1
"""Part of vLLM's compile-cache key: raise it whenever the operator's meaning changes."""


def steer_rows(  # noqa: PLR0917 - an operator's schema is positional
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    read: torch.Tensor,
    terms: torch.Tensor,
    write: torch.Tensor,
    scale: torch.Tensor,
    dose: torch.Tensor,
) -> torch.Tensor:
    """Write to the residual stream of a step's rows; see ``probes.steering.Update`` for the definition.

    Args:
        hidden: (n, d_model), any float dtype.
        residual: (n, d_model) to be added to it, or None where ``hidden`` is the stream already.
        read: (d_model, k) float32.
        terms: (6, k) float32: offset, constant, linear, rectified, threshold, limit.
        write: (k, d_model) float32, rows of length 1.
        scale: (at least n, k) float32: by how much of its strength a steer writes to a row; 0 for not at all.
        dose: (at least n, k) float32; gets the size of each change.
    Returns: (n, d_model), what takes the place of ``hidden``.
    Raises:
        ValueError: the step has more rows than the buffers.
    """
    rows = hidden.shape[0]
    if rows > scale.shape[0]:
        raise ValueError(
            f"a step has {rows} rows, the steer's buffer {scale.shape[0]}: not every row would be steered."
        )
    offset, constant, linear, rectified, threshold, limit = terms.unbind()
    factor = scale[:rows]
    with true_float32(hidden.device):
        x = torch.addmm(offset, stream_of(hidden, residual), read)
        size = (constant + linear * x + rectified * x.where(x > threshold, 0.0)) * factor
        size = size.clamp(-limit, limit).where(factor != 0, 0.0)
        changed = (hidden.float() + size @ write).to(hidden.dtype)
    torch.abs(size, out=dose[:rows])
    return changed.where((size != 0).any(dim=1, keepdim=True), hidden)


steer = torch.library.custom_op("telltale::steer", steer_rows, mutates_args=("dose",))
"""``steer_rows`` as an operator. Eager forwards call the function."""


@steer.register_fake
def _(hidden: torch.Tensor, *_others: object) -> torch.Tensor:
    """A tensor like ``hidden``."""
    return torch.empty_like(hidden)
