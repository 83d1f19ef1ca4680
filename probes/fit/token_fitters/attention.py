"""An attention probe: where to look and what is there, learned together (methods: arXiv 2601.11516)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from probes.aggregate import Aggregator
from probes.aggregate.attention import Attention
from probes.fit.token_fitters.base import HeadsModule, TokenFitter, TokenModule


class AttentionModule(HeadsModule):
    """Queries begin at zero, so that it begins as the mean over the tokens."""

    def __init__(
        self,
        mean: npt.NDArray[np.float32],
        scale: npt.NDArray[np.float32],
        *,
        heads: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(mean, scale, heads=heads, generator=generator)
        self.query = torch.nn.Parameter(torch.zeros(heads, len(mean)))

    def statistic(self, rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """See ``TokenModule.statistic``."""
        queries = (rows @ self.query.T * self.unit).masked_fill(~there[..., None], -torch.inf)
        found: torch.Tensor = (torch.softmax(queries, dim=1) * self.values(rows)).sum(dim=(1, 2))
        return found

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """See ``TokenModule.tensors``."""
        return {**super().tensors(), "query": (self.query.detach() * self.unit).numpy()}


class AttentionFitter(TokenFitter):
    """Attention over the tokens with a few heads. Dilutes in texts longer than those that it was fitted on."""

    kind = "attention"
    makes = "attention"

    heads: Annotated[int, Field(ge=1, le=64)] = 4

    @property
    def aggregate(self) -> Aggregator:
        """See ``TokenFitter.aggregate``."""
        return Attention(heads=self.heads)

    def module(
        self, mean: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], generator: torch.Generator
    ) -> TokenModule:
        """See ``TokenFitter.module``."""
        return AttentionModule(mean, scale, heads=self.heads, generator=generator)
