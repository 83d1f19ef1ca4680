"""The gate operator: which rows of a step a steer writes to, by what was read of them earlier in the same pass.

It stands between the operator that reads and the one that writes. It knows neither requests nor policies: above what a
row opens a gate, and which rows may be written to then, stands in small buffers that are filled before the step. Every
shape depends on the buffers and the step's rows alone, so that it survives compilation and CUDA graphs.
"""

from __future__ import annotations

from typing import Final

import torch

from probes.steering.steer import END

GATE_VERSION: Final = 1
"""Part of vLLM's compile-cache key: raise it whenever the operator's meaning changes."""


def gate_rows(  # noqa: PLR0917 - an operator's schema is positional
    readouts: torch.Tensor,
    offsets: torch.Tensor,
    by_token: torch.Tensor,
    columns: torch.Tensor,
    bar: torch.Tensor,
    room: torch.Tensor,
    place: torch.Tensor,
    segment: torch.Tensor,
    latch: torch.Tensor,
    scale: torch.Tensor,
    rows: int,
) -> None:
    """Open G gates, and let their steers write.

    Args:
        readouts: (at least rows, width) float32, what a tap has read.
        offsets: (G,) int64, the column that each gate looks at.
        by_token: (G,) bool: whether it opens for that row alone, or for all rows of the request behind it.
        columns: (G,) int64, the steer of each gate among those of ``scale``.
        bar: (at least rows, G) float32, above which a row opens the gate; infinite where it cannot.
        room: (at least rows, G) float32: by how much of its strength the steer may write to the row; 0 for not at all.
        place: (at least rows,) int64, the rows' positions.
        segment: (at least rows,) int64, the number of each row's request.
        latch: (requests, G) int64, the first position that has opened the gate so far; gets that of this step.
        scale: (at least rows, steers) float32, raised where a gate is open.
        rows: of the step.
    """
    own, where = segment[:rows], place[:rows, None]
    opens = readouts[:rows].index_select(1, offsets) > bar[:rows]
    first = where.where(opens & ~by_token, END)
    found = latch.scatter_reduce(0, own[:, None].expand(-1, first.shape[1]), first, "amin")
    latch.copy_(found)
    is_open = opens.where(by_token, where > found.index_select(0, own))
    wanted = room[:rows] * is_open
    into = scale[:rows]
    into.copy_(into.scatter_reduce(1, columns.expand(rows, -1), wanted, "amax"))


gate = torch.library.custom_op("telltale::gate", gate_rows, mutates_args=("latch", "scale"))
"""``gate_rows`` as an operator. Eager forwards call the function."""


@gate.register_fake
def _(*_buffers: object) -> None:
    """Nothing is returned, so there is no shape to infer."""
