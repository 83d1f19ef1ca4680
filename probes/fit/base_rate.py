"""What alarms are worth: how many there are and how many of them are right, by how rare the thing is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["AlarmRate", "base_rate_panel"]


@dataclass(frozen=True, slots=True)
class AlarmRate:
    """Alarms at one prevalence.

    Attributes:
        prevalence: share of requests that are positive.
        tpr: share of the positive requests that fire.
        alarms: of 10,000 requests, so many fire.
        right: of the 10,000, so many fire rightly.
    """

    prevalence: float
    tpr: float
    alarms: float
    right: float

    @property
    def precision(self) -> float:
        """Share of the alarms that are right; 0 where nothing fires."""
        return self.right / self.alarms if self.alarms else 0.0


def base_rate_panel(
    fpr: float, *, tprs: Sequence[float] = (0.5, 0.9), prevalences: Sequence[float] = (1e-2, 1e-3, 1e-4)
) -> list[AlarmRate]:
    """What a false-positive rate costs (Axelsson, 2000: the base-rate fallacy).

    Args:
        fpr: share of the benign requests that fire.
        tprs: shares of the positive requests that fire.
        prevalences: shares of requests that are positive.
    """
    return [
        AlarmRate(prevalence, tpr, 1e4 * (prevalence * tpr + (1 - prevalence) * fpr), 1e4 * prevalence * tpr)
        for prevalence in prevalences
        for tpr in tprs
    ]
