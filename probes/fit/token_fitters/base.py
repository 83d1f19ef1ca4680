"""What a token fitter is: labelled sequences of rows in, a probe out whose statistic was fitted as it is served."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field

from probes.aggregate import Aggregator
from probes.fit.reading.sequences import Sequences
from probes.fit.training.descent import Descent, descend, statistics_by
from probes.fit.training.linear_probe import Float64, Labels


class TokenModule(torch.nn.Module, ABC):
    """A probe's parameters while they are fitted.

    Args:
        mean, scale: (d_model,), units of the rows.

    Attributes:
        unit: by which products are divided: those of so many dimensions are as large as one of them only if divided by
            their number's root.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    unit: float

    def __init__(self, mean: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("scale", torch.from_numpy(scale))
        self.unit = len(mean) ** -0.5

    def forward(self, rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """(b, T, d_model) and (b, T), whether a row is there: to (b,) logits."""
        return self.statistic((rows - self.mean) / self.scale, there)

    @abstractmethod
    def statistic(self, rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """The same of rows in standard units."""

    @abstractmethod
    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """As an artifact of the kind holds them, without ``mean`` and ``scale``."""


class HeadsModule(TokenModule):
    """Heads that each give a value of every row.

    Args:
        mean, scale: (d_model,), units of the rows.
        heads: how many.
        generator: of the first values.
    """

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

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """(b, T, d_model) in standard units to (b, T, heads)."""
        return rows @ self.value.T * self.unit + self.bias

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """See ``TokenModule.tensors``."""
        return {"value": (self.value.detach() * self.unit).numpy(), "bias": self.bias.detach().numpy().copy()}


@dataclass(frozen=True, slots=True, eq=False)
class TokenProbe:
    """A fitted probe.

    Attributes:
        kind: of the detector.
        aggregate: that makes its statistic.
        module: its parameters.
    """

    kind: str
    aggregate: Aggregator
    module: TokenModule

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """As an artifact of its kind holds them."""
        units = {"mean": self.module.mean.numpy(), "scale": self.module.scale.numpy()}
        return {**units, **self.module.tensors()}

    def score(self, sequences: Sequences) -> Float64:
        """(n,) the statistic of each request, in logits."""
        return statistics_by(self.module, sequences)


class TokenFitter(BaseModel, ABC):
    """A way to fit a probe on whole sequences. One file per fitter, found by its ``kind``.

    The fields of a subclass are its parameters; they stand in recipes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: ClassVar[str]
    makes: ClassVar[str]
    """The kind of detector."""

    learning_rate: Annotated[float, Field(gt=0, le=1, description="of AdamW")] = 1e-2
    weight_decay: Annotated[float, Field(ge=0, le=10, description="of AdamW")] = 1e-3
    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over the rows, at most")] = 50
    patience: Annotated[int, Field(ge=0, le=1000, description="passes without a gain before it ends")] = 6
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    @abstractmethod
    def aggregate(self) -> Aggregator:
        """The one that it is fitted under, and served with."""

    @abstractmethod
    def module(
        self, mean: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], generator: torch.Generator
    ) -> TokenModule:
        """Fresh parameters."""

    def fit(self, sequences: Sequences, labels: Labels) -> TokenProbe:
        """Fit.

        Args:
            sequences: n requests.
            labels: (n,), 0 or 1, both at least twice.
        """
        mean, scale = _units(sequences)
        module = self.module(mean, scale, torch.Generator().manual_seed(self.seed))
        settings = Descent(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            epochs=self.epochs,
            patience=self.patience,
            seed=self.seed,
        )
        descend(module, sequences, labels, settings)
        return TokenProbe(self.makes, self.aggregate, module)

    def config(self) -> dict[str, Any]:
        """The parameters as they stand in a recipe."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    def __str__(self) -> str:
        parameters = ",".join(f"{key}={value}" for key, value in self.model_dump(mode="json").items())
        return f"{self.kind}({parameters})"


def _units(sequences: Sequences) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and spread of each dimension over all rows, request by request: the rows may be a memory map."""
    count, total = 0, np.zeros(sequences.d_model)
    for rows in sequences:
        count, total = count + len(rows), total + rows.sum(axis=0, dtype=np.float64)
    mean = total / count
    squares = np.zeros_like(mean)
    for rows in sequences:
        squares += np.square(rows - mean).sum(axis=0, dtype=np.float64)
    scale = np.sqrt(squares / count)
    return mean.astype(np.float32), np.where(scale > _SMALLEST_SCALE, scale, 1.0).astype(np.float32)


_SMALLEST_SCALE = 1e-6
