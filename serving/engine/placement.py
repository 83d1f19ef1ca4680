"""Which KV block a row of readouts belongs to: remembered when a step is scheduled, needed when its result is back.

In between a request may be aborted and its blocks freed, so the answer cannot be asked for later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """The blocks that a request's rows of one step fall into.

    Attributes:
        first: number of the first of these blocks in the request's sequence of blocks.
        blocks: their ids.
    """

    first: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Places:
    """Where each row of a step goes.

    Attributes:
        rows: (n,) the rows that have a place.
        blocks: (n,) block ids.
        offsets: (n,) places inside the blocks.
    """

    rows: Index
    blocks: Index
    offsets: Index


def places_of(
    spans: Mapping[str, Span], request_ids: Sequence[str], counts: Index, positions: Index, *, block_size: int
) -> Places:
    """The places of all rows of a step.

    Args:
        spans: of the step's requests.
        request_ids: (R,) in the order of the rows.
        counts: (R,) rows of each request.
        positions: (n,) absolute token positions.
        block_size: tokens in a block.
    """
    found = [spans.get(request_id) for request_id in request_ids]
    lengths = np.array([len(span.blocks) if span is not None else 0 for span in found], dtype=np.int64)
    bases = np.cumsum(lengths) - lengths
    firsts = np.array([span.first if span is not None else 0 for span in found], dtype=np.int64)
    ids = np.array([block for span in found if span is not None for block in span.blocks], dtype=np.int64)
    inside = positions // block_size - np.repeat(firsts, counts)
    rows = np.flatnonzero((inside >= 0) & (inside < np.repeat(lengths, counts)))
    return Places(rows, ids[(np.repeat(bases, counts) + inside)[rows]], (positions % block_size)[rows])
