"""A MultiMax probe: several directions, of each of which the largest value counts (arXiv 2601.11516)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from probes.aggregate import Aggregator
from probes.aggregate.multimax import MultiMax
from probes.fit.token_fitters.base import TokenFitter, TokenModule


class MultiMaxModule(TokenModule):
    """Values of all heads, and of each the largest."""

    def __init__(
        self,
        mean: npt.NDArray[np.float32],
        scale: npt.NDArray[np.float32],
        *,
        heads: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(mean, scale)
        self.value = torch.nn.Parameter(0.1 * torch.randn(heads, len(mean), generator=generator))
        self.bias = torch.nn.Parameter(torch.zeros(heads))

    def statistic(self, rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """See ``TokenModule.statistic``."""
        values = (rows @ self.value.T * self.unit + self.bias).masked_fill(~there[..., None], -torch.inf)
        found: torch.Tensor = values.amax(dim=1).sum(dim=1)
        return found

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """See ``TokenModule.tensors``."""
        return {"value": (self.value.detach() * self.unit).numpy(), "bias": self.bias.detach().numpy().copy()}


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
