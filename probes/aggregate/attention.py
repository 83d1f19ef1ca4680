"""Attention over tokens: each head weighs the values of all tokens by the softmax of their queries."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from probes.aggregate.base import Aggregator, Scores

_BLOCK = 32


class Attention(Aggregator):
    """``sum over heads h of sum over t of softmax_t(q[t, h]) * v[t, h]``: the statistic of an attention probe.

    A row gives its ``heads`` queries, then its ``heads`` values. Streamed exactly, with the running maximum, normaliser
    and numerator of FlashAttention (Dao et al. 2022) for each head. Dilutes in long texts: the weights of all tokens
    sum to 1 (arXiv 2601.11516).
    """

    kind = "attention"

    heads: Annotated[int, Field(ge=1, le=64, description="of the detector")]

    @property
    def channels(self) -> int:
        """A query and a value for each head."""
        return 2 * self.heads

    @property
    def state_size(self) -> int:
        """For each head the largest query, the sum of the weights and that of the weighted values."""
        return 3 * self.heads

    @property
    def initial(self) -> float:
        """No query yet; sums that have not begun are marked alike."""
        return -np.inf

    def update(self, state: Scores, values: Scores) -> Scores:
        """See ``Aggregator.update``."""
        steps, requests = values.shape[:2]
        split = values.reshape(steps, requests, -1, 2, self.heads)
        largest, weight, total = (part.swapaxes(1, 2).copy() for part in np.split(state, 3, axis=1))
        fresh = np.isneginf(largest)
        weight[fresh] = total[fresh] = 0.0
        running = np.empty((steps, requests, state.shape[2]), dtype=np.float64)
        for start in range(0, steps, _BLOCK):
            queries, found = split[start : start + _BLOCK, :, :, 0], split[start : start + _BLOCK, :, :, 1]
            maxima = np.maximum(np.maximum.accumulate(queries, axis=0), largest)
            # Of what came before, and of each row of the block for each row behind it: never above 1.
            kept = np.exp(largest - maxima)
            later = np.tri(len(queries), dtype=bool)[:, :, None, None, None]
            shares = np.exp(np.where(later, queries[None] - maxima[:, None], -np.inf))
            weights = kept * weight + shares.sum(axis=1)
            totals = kept * total + np.einsum("tirbh,irbh->trbh", shares, found)
            running[start : start + len(queries)] = (totals / weights).sum(axis=-1)
            largest, weight, total = maxima[-1], weights[-1], totals[-1]
        state[:] = np.concatenate([largest, weight, total], axis=2).swapaxes(1, 2)
        return running
