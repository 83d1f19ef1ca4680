"""A probe with one hidden layer, its token scores pooled as they are served."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from probes.aggregate import Aggregator
from probes.aggregate.last import Last
from probes.aggregate.max import Max
from probes.aggregate.mean import Mean
from probes.fit.token_fitters.base import TokenFitter, TokenModule

Pool = Literal["last", "max", "mean"]


class MlpModule(TokenModule):
    """Hidden units as in torch's own linear layer; what comes out begins at zero."""

    def __init__(
        self,
        mean: npt.NDArray[np.float32],
        scale: npt.NDArray[np.float32],
        *,
        units: int,
        pool: Pool,
        generator: torch.Generator,
    ) -> None:
        super().__init__(mean, scale)
        self._pool = pool
        width = len(mean)
        self.hidden = torch.nn.Parameter(torch.randn(units, width, generator=generator) * width**-0.5)
        self.hidden_bias = torch.nn.Parameter(torch.zeros(units))
        self.out = torch.nn.Parameter(torch.randn(units, generator=generator) * units**-0.5)
        self.out_bias = torch.nn.Parameter(torch.zeros(1))

    def statistic(self, rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """See ``TokenModule.statistic``."""
        scores = torch.relu(rows @ self.hidden.T + self.hidden_bias) @ self.out + self.out_bias
        if self._pool == "max":
            return scores.masked_fill(~there, -torch.inf).amax(dim=1)
        if self._pool == "mean":
            return (scores * there).sum(dim=1) / there.sum(dim=1)
        return scores[torch.arange(len(scores)), there.sum(dim=1) - 1]

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """See ``TokenModule.tensors``."""
        names = ("hidden", "hidden_bias", "out", "out_bias")
        return {name: getattr(self, name).detach().numpy().copy() for name in names}


class MlpFitter(TokenFitter):
    """One hidden layer. It may compute a concept that the model does not have: compare it with shuffled labels."""

    kind = "mlp"
    makes = "mlp"

    units: Annotated[int, Field(ge=1, le=512, description="of the hidden layer, each a direction to read")] = 64
    pool: Annotated[Pool, Field(description="how token scores become the statistic")] = "mean"

    @property
    def aggregate(self) -> Aggregator:
        """See ``TokenFitter.aggregate``."""
        kinds: dict[Pool, type[Aggregator]] = {"last": Last, "max": Max, "mean": Mean}
        return kinds[self.pool]()

    def module(
        self, mean: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], generator: torch.Generator
    ) -> TokenModule:
        """See ``TokenFitter.module``."""
        return MlpModule(mean, scale, units=self.units, pool=self.pool, generator=generator)
