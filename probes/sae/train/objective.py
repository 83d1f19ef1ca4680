"""What makes an autoencoder sparse: an activation with its thresholds, and what it adds to the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

__all__ = ["Coded", "Objective", "smallest_kept"]


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A batch behind the activation.

    Attributes:
        codes: (n, width), zero where a latent is not active.
        penalty: a scalar that is added to the share of the variance that is left unexplained.
    """

    codes: torch.Tensor
    penalty: torch.Tensor


class Objective(torch.nn.Module, ABC):
    """One way to be sparse. Its parameters are trained with the autoencoder's, its buffers stand in a checkpoint."""

    @abstractmethod
    def begin(self, pre_activations: torch.Tensor) -> None:
        """Set the thresholds before the first step.

        Args:
            pre_activations: (n, width) of the untrained encoder.
        """

    @abstractmethod
    def code(self, pre_activations: torch.Tensor, progress: float) -> Coded:
        """The codes of a batch in training.

        Args:
            pre_activations: (n, width).
            progress: how much of the training is done, from 0 to 1.
        """

    @abstractmethod
    def thresholds(self, width: int) -> torch.Tensor:
        """(width,): a latent is active where its pre-activation is above it. What is served."""


def smallest_kept(values: torch.Tensor, kept: int) -> float:
    """The smallest of the ``kept`` largest values; 0 where not so many are positive.

    Args:
        values: not negative, any shape.
        kept: at least 1.
    """
    flat = values.detach().flatten()
    if kept >= flat.numel():
        return 0.0
    # A copy is partitioned by numpy: an order of magnitude faster than torch's own selection on a CPU.
    array = flat.cpu().numpy().copy()
    place = len(array) - kept
    array.partition(place)
    return max(float(array[place]), 0.0)
