"""Sequences of different lengths in one batch, padded on the left; knows tokens and no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["NO_POSITION", "Padded", "batches_by_length", "left_padded"]

NO_POSITION = -1
"""Of a row that stands for no token; below every span, so that it is never written to."""
_ROWS_PER_BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """Sequences of different lengths in one batch, padded on the left.

    Attributes:
        tokens: (n, longest) int64.
        mask: (n, longest) int64, 0 where padded.
        positions: (n, longest) int64, each token's position in its own sequence; -1 where padded.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def left_padded(rows: Sequence[Sequence[int]]) -> Padded:
    """One batch of sequences, none of them empty."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros((len(rows), longest), dtype=torch.long)
    positions = torch.full((len(rows), longest), NO_POSITION)
    for place, row in enumerate(rows):
        tokens[place, longest - len(row) :] = torch.tensor(list(row))
        positions[place, longest - len(row) :] = torch.arange(len(row))
    return Padded(tokens, (positions >= 0).long(), positions)


def batches_by_length(rows: Sequence[Sequence[int]], most: int = _ROWS_PER_BATCH) -> Iterator[list[int]]:
    """Numbers of rows, at most so many at a time, those of like length together."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), most):
        yield order[start : start + most]
