"""The tap operator: ``readout = s @ W + b`` and ``|s|^2`` in true float32, written into a small persistent buffer.

It knows neither requests nor detectors. It is a ``torch.library`` operator, so that it survives compilation and CUDA
graphs; it mutates only its own buffers and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

OP_VERSION = 1
"""Part of vLLM's compile-cache key: raise it whenever the operator's meaning changes."""


@contextmanager
def _true_float32(device: torch.device) -> Iterator[None]:
    """Keep a float32 product from becoming TF32, which costs 3e-3 on streams with large dimensions."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.library.custom_op("telltale::read", mutates_args=("out", "fired"))
def read(  # noqa: PLR0917 - an operator's schema is positional
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    fired: torch.Tensor,
) -> None:
    """Read the residual stream of a step's rows.

    Args:
        hidden: (n, d_model), any float dtype.
        residual: (n, d_model) to be added to it, or None where ``hidden`` is the stream already.
        weight: (d_model, k) float32.
        bias: (k,) float32.
        out: (at least n, k + 1) float32; row i gets the k products and then ``|s|^2``.
        fired: (1,) int64, counts calls.
    """
    rows, width = hidden.shape[0], weight.shape[1]
    stream = hidden.float() if residual is None else hidden.float() + residual.float()
    with _true_float32(hidden.device):
        torch.addmm(bias, stream, weight, out=out[:rows, :width])
    out[:rows, width] = torch.linalg.vecdot(stream, stream)
    fired.add_(1)


@read.register_fake
def _(  # noqa: PLR0917 - as above
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    fired: torch.Tensor,
) -> None:
    """Nothing is returned, so there is no shape to infer."""
