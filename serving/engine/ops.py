"""The tap operator: ``readout = s @ W + b`` and ``|s|^2`` in true float32, written into a small persistent buffer.

It knows neither requests nor detectors. It is a ``torch.library`` operator, so that it survives compilation and CUDA
graphs; it mutates only its own buffers, never waits for the device, and treats every row by itself: what stands in
the padded rows of a graph, were it NaN, reaches no other row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, cast

import torch

OP_VERSION = 1
"""Part of vLLM's compile-cache key: raise it whenever the operator's meaning changes."""

_NARROW = frozenset({"bf16", "tf32"})
"""What torch may compute float32 products in, where it was told that this will do."""


_CUDA: Final[Any] = torch.backends.cuda.matmul
_CPU: Final[Any] = cast("Any", torch.backends.mkldnn).matmul
_AS_IT_IS: Final = nullcontext()


def true_float32(device: torch.device) -> AbstractContextManager[None]:
    """Keep float32 products from becoming TF32 (CUDA) or bfloat16 (oneDNN on a CPU with AMX).

    TF32 costs 3e-4 of a row's norm on streams with large dimensions, a thousand times what float32 does.

    Only the backend's own ``matmul.fp32_precision`` is read and written: the libraries are configured from it whatever
    way it was set, ``torch.set_float32_matmul_precision`` and ``allow_tf32`` included. Those older ways cannot be used
    here: torch raises when they are read in a process that also used the newer one, as parts of vLLM do.

    Args:
        device: where the products are computed.
    """
    # Asked once per tap and step: a context made anew where nothing is to be done takes a third of a token's time.
    matmul = _CUDA if device.type == "cuda" else _CPU
    before: str = matmul.fp32_precision
    return _widened(matmul, before) if before in _NARROW else _AS_IT_IS


@contextmanager
def _widened(matmul: Any, before: str) -> Iterator[None]:
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        # What was inherited from torch.backends.fp32_precision is inherited again, what was set here is set again.
        matmul.fp32_precision = "none"
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before


def read_rows(  # noqa: PLR0917 - an operator's schema is positional
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
    Raises:
        ValueError: the step has more rows than ``out``: torch would write elsewhere and only warn.
    """
    rows, width = hidden.shape[0], weight.shape[1]
    if rows > out.shape[0]:
        raise ValueError(f"a step has {rows} rows, the tap's buffer {out.shape[0]}: not every row would be read.")
    stream = stream_of(hidden, residual)
    products, squares = out[:rows, :width], out[:rows, width]
    with true_float32(hidden.device):
        torch.addmm(bias, stream, weight, out=products)
    # A reduction, not a product: no TF32 here, and no second (n, d_model) tensor.
    torch.linalg.vector_norm(stream, dim=1, out=squares)
    squares.square_()
    fired.add_(1)


read = torch.library.custom_op("telltale::read", read_rows, mutates_args=("out", "fired"))
"""``read_rows`` as an operator. Eager forwards call the function: its way through the dispatcher costs a single
token as much as its products."""


def stream_of(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The stream in float32: one new (n, d_model) tensor at most, the sum never rounded to a narrower type."""
    if residual is None:
        return hidden.float()
    if hidden.dtype is torch.float32:
        return hidden + residual
    return hidden.float().add_(residual)


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
