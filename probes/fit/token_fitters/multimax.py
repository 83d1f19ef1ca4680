"""A MultiMax probe: several directions, of each of which the largest value counts (arXiv 2601.11516)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from probes.aggregate import Aggregator
from probes.aggregate.multimax import MultiMax
from probes.fit.token_fitters.base import HeadsModule, TokenFitter, TokenModule


class MultiMaxModule(HeadsModule):
    """Of each head the largest value."""

    def statistic(self, rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """See ``TokenModule.statistic``."""
        found: torch.Tensor = self.values(rows).masked_fill(~there[..., None], -torch.inf).amax(dim=1).sum(dim=1)
        return found


class MultiMaxFitter(TokenFitter):
    """A hard maximum over the tokens in each of a few heads. Does not dilute; grows with length."""

    kind = "multimax"
    makes = "multimax"

    heads: Annotated[int, Field(ge=1, le=64)] = 4

    @property
    def aggregate(self) -> Aggregator:
        """See ``TokenFitter.aggregate``."""
        return MultiMax(heads=self.heads)

    def module(
        self, mean: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], generator: torch.Generator
    ) -> TokenModule:
        """See ``TokenFitter.module``."""
        return MultiMaxModule(mean, scale, heads=self.heads, generator=generator)
