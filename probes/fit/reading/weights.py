"""The weight of each token's score in an aggregate that is linear in the scores; knows no model.

The score of a linear probe is linear in the activation. So the aggregate of the scores is the score of the activations'
mean with the same weights: a probe that is fitted on such means is served exactly by scoring every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.errors import TelltaleError

__all__ = ["ScoreWeights", "WeightsError", "is_linear", "score_weights"]

_TOLERANCE = 1e-9
_TRIED = 1024
"""Scores on which linearity is tried: more than any window holds."""


class WeightsError(TelltaleError, ValueError):
    """An aggregate is not linear in the scores."""


@dataclass(frozen=True, slots=True)
class ScoreWeights:
    """Weights of several aggregates for one length.

    Attributes:
        values: (aggregates, tokens) float64; each row sums to 1. Equal weights where the aggregate is not defined.
        defined: (aggregates,).
    """

    values: npt.NDArray[np.float64]
    defined: npt.NDArray[np.bool_]


@lru_cache(maxsize=512)
def score_weights(aggregates: tuple[Aggregator, ...], count: int) -> ScoreWeights:
    """The weights that the aggregates themselves give to ``count`` scores, found by feeding them single impulses.

    Raises:
        WeightsError: an aggregate is not linear, such as a maximum.
    """
    values, defined = [], []
    for aggregate in aggregates:
        final = aggregate.update(aggregate.new_state(count, 1), np.eye(count)[:, :, None])[-1, :, 0]
        known = bool(np.isfinite(final).all())
        _require_linear(aggregate, count, final if known else None)
        values.append(final if known else np.full(count, 1.0 / count))
        defined.append(known)
    return ScoreWeights(np.array(values), np.array(defined))


def is_linear(aggregate: Aggregator) -> bool:
    """Whether an aggregate of scores is the score of a mean."""
    try:
        score_weights((aggregate,), _TRIED)
    except WeightsError:
        return False
    return True


def _require_linear(aggregate: Aggregator, count: int, weights: npt.NDArray[np.float64] | None) -> None:
    probe = np.cos(np.arange(count, dtype=np.float64)) - 2.0
    found = aggregate.update(aggregate.new_state(1, 1), probe[:, None, None])[-1, 0, 0]
    if weights is not None and abs(found - weights @ probe) > _TOLERANCE:
        raise WeightsError(
            f"aggregate {aggregate}: it is not linear in the scores, so a probe cannot be fitted for it in one step. "
            "Use last, mean, ema or rolling in 'search.aggregates'; 'search.serve' takes any."
        )
