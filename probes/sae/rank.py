"""A threshold that stands for a rank: how a TopK autoencoder becomes one whose latents can be read alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from probes.sae.sae import Float32, Sae, SaeError

_CHUNK = 1024
_KEPT = 8
"""So many times the rank are kept of each row: no more latents of a row can lie above the threshold that is found."""
_FEWEST_ROWS = 200


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the active sets of a rank and of the threshold that stands for it are the same, on rows not used for it.

    Attributes:
        rank: latents that are kept of each row.
        threshold: in their place, one for all latents.
        rows: that it was measured on.
        jaccard: mean over rows of |both| / |either|.
        kept: share of the latents of the rank that are active by the threshold too.
        of_rank: share of the latents active by the threshold that are among the rank's.
        l0, l0_spread: mean number of active latents of a row by the threshold, and its standard deviation.
    """

    rank: int
    threshold: float
    rows: int
    jaccard: float
    kept: float
    of_rank: float
    l0: float
    l0_spread: float

    def as_dict(self) -> dict[str, Any]:
        """For the card."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


def threshold_for_rank(sae: Sae, rank: int, rows: Float32) -> tuple[Sae, Agreement]:
    """The threshold at which as many latents are active as the rank keeps, in the mean over rows.

    It is what BatchTopK infers with (Bussmann et al. 2024, arXiv 2412.06410). Every second row finds it, the others
    measure how far the active sets agree.

    Args:
        sae: with thresholds of 0.
        rank: latents that are kept of each row, where they are positive.
        rows: (n, d_model) of ordinary text, sinks left out; 200 or more.
    Raises:
        SaeError: the rank is not below the number of latents, or there are too few rows.
    """
    if not 0 < rank < sae.width:
        raise SaeError(
            f"it keeps {rank} latents of each row; there are {sae.width}, and it must be 1 or more and fewer."
        )
    if len(rows) < _FEWEST_ROWS:
        raise SaeError(f"{len(rows)} rows do not find a threshold; at least {_FEWEST_ROWS} are needed.")
    kept = min(sae.width, _KEPT * rank)
    largest = np.concatenate(
        [np.partition(found, sae.width - kept, axis=1)[:, sae.width - kept :] for found in _positive(sae, rows[0::2])]
    )
    count = rank * len(largest)
    ordered = np.sort(largest, axis=None)
    threshold = float(ordered[-count - 1]) if count < ordered.size else 0.0
    served = replace(sae, threshold=np.full(sae.width, max(threshold, 0.0), dtype=np.float32))
    return served, _agreement(served, rank, rows[1::2])


def _positive(sae: Sae, rows: Float32) -> Iterator[Float32]:
    for start in range(0, len(rows), _CHUNK):
        yield np.maximum(sae.pre_activations(rows[start : start + _CHUNK]), 0.0)


def _agreement(served: Sae, rank: int, rows: Float32) -> Agreement:
    shares, both_all, ranked_all, active_all = [], 0, 0, []
    for found in _positive(served, rows):
        smallest = np.partition(found, served.width - rank, axis=1)[:, served.width - rank, None]
        ranked = (found >= smallest) & (found > 0)
        active = found > served.threshold
        both, either = (ranked & active).sum(axis=1), (ranked | active).sum(axis=1)
        shares.append(both / np.maximum(either, 1))
        both_all += int(both.sum())
        ranked_all += int(ranked.sum())
        active_all.append(active.sum(axis=1))
    active = np.concatenate(active_all)
    return Agreement(
        rank=rank,
        threshold=float(served.threshold[0]),
        rows=len(rows),
        jaccard=float(np.concatenate(shares).mean()),
        kept=both_all / max(ranked_all, 1),
        of_rank=both_all / max(int(active.sum()), 1),
        l0=float(active.mean()),
        l0_spread=float(active.std()),
    )
