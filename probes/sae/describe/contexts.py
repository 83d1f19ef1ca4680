"""Where a latent was active, for people to look at: windows across all quantiles of its activity, not the top alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.sae.describe.codes import Codes

__all__ = ["Context", "pick_contexts"]

_BEFORE = 20
_AFTER = 6
"""Tokens shown around the one with the most activity."""

Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Context:
    """A stretch of one request.

    Attributes:
        quantile: 0 for the lowest part of the latent's activity, ``quantiles`` - 1 for the top.
        tokens: ids.
        activity: of the latent on each of them.
        marked: which of them has the most.
    """

    quantile: int
    tokens: tuple[int, ...]
    activity: tuple[float, ...]
    marked: int


def pick_contexts(
    codes: Codes,
    rows: Indices,
    values: Float32,
    requests: Indices,
    *,
    per_quantile: Sequence[int],
    generator: np.random.Generator,
) -> list[Context]:
    """Contexts of one latent, those of the top quantile first.

    Of each request the row with the most activity counts. In the top quantile the contexts with the most are taken,
    in the others random ones.

    Args:
        codes: for the tokens.
        rows: where the latent is active, ascending.
        values: its activity there.
        requests: (rows of ``codes``,) the request of each row.
        per_quantile: how many contexts of each quantile, the lowest first.
        generator: of the draw.
    """
    if not len(rows):
        return []
    starts = np.flatnonzero(np.diff(requests[rows], prepend=-1))
    ends = np.append(starts[1:], len(rows))
    peaks = np.array([start + int(values[start:end].argmax()) for start, end in zip(starts, ends, strict=True)])
    peaks = peaks[np.argsort(values[peaks], kind="stable")]
    found = []
    for quantile, part in reversed(list(enumerate(np.array_split(peaks, len(per_quantile))))):
        wanted = min(per_quantile[quantile], len(part))
        top = quantile == len(per_quantile) - 1
        chosen = part[::-1][:wanted] if top else generator.permutation(part)[:wanted]
        found += [_around(codes, rows, values, requests, peak=int(peak), quantile=quantile) for peak in chosen]
    return found


def _around(codes: Codes, rows: Indices, values: Float32, requests: Indices, *, peak: int, quantile: int) -> Context:
    row = int(rows[peak])
    request = int(requests[row])
    first = max(row - _BEFORE, int(codes.offsets[request]))
    last = min(row + _AFTER + 1, int(codes.offsets[request + 1]))
    activity = np.zeros(last - first, dtype=np.float64)
    inside = slice(int(np.searchsorted(rows, first)), int(np.searchsorted(rows, last)))
    activity[rows[inside] - first] = values[inside]
    return Context(
        quantile,
        tuple(int(token) for token in codes.tokens[first:last]),
        tuple(round(float(value), 3) for value in activity),
        row - first,
    )
