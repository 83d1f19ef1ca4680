"""BatchTopK: of a batch the k largest activations per row on average (Bussmann et al., 2024, arXiv:2412.06410)."""

from __future__ import annotations

import torch

from probes.sae.train.objective import Coded, Objective, smallest_kept

__all__ = ["BatchTopK"]

_DECAY = 0.99
"""Of the average: about 100 batches. The 0.999 of the authors' code would lag behind in a few thousand steps."""


class BatchTopK(Objective):
    """Keeps ``k * n`` values of a batch of n rows; served with one threshold for all latents.

    The threshold is the exponential moving average of the smallest kept value.

    Args:
        k: active latents per row, on average.
    """

    average: torch.Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self._k = k
        self.register_buffer("average", torch.tensor(-1.0, dtype=torch.float64))

    def begin(self, pre_activations: torch.Tensor) -> None:
        """See ``Objective.begin``; nothing is needed."""

    def code(self, pre_activations: torch.Tensor, progress: float) -> Coded:
        """See ``Objective.code``. Equal values at the edge are all kept."""
        positive = pre_activations.relu()
        least = smallest_kept(positive, self._k * len(positive))
        if self.average < 0:
            self.average.fill_(least)
        else:
            self.average.mul_(_DECAY).add_(least, alpha=1 - _DECAY)
        return Coded(positive * (positive >= least), torch.zeros(()))

    def thresholds(self, width: int) -> torch.Tensor:
        """See ``Objective.thresholds``."""
        return torch.full((width,), max(float(self.average), 0.0))
