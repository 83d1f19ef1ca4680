"""Everything that decides what the trainer makes of given rows."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from probes.sae.train.batch_topk import BatchTopK
from probes.sae.train.jump_relu import JumpReLU
from probes.sae.train.objective import Objective

__all__ = ["AnyActivation", "BatchTopKSettings", "JumpReLUSettings", "TrainingSettings"]

_REFERENCE_RATE = 2e-4
_REFERENCE_WIDTH = 1 << 14


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BatchTopKSettings(_Strict):
    """See ``probes.sae.train.batch_topk``."""

    kind: Literal["batchtopk"]
    k: Annotated[int, Field(ge=1, description="active latents per token, on average")] = 32

    def make(self, width: int) -> Objective:
        """The objective."""
        return BatchTopK(min(self.k, width))


class JumpReLUSettings(_Strict):
    """See ``probes.sae.train.jump_relu``."""

    kind: Literal["jumprelu"]
    l0: Annotated[float, Field(gt=0, description="active latents per token that the penalty aims at")] = 32.0
    bandwidth: Annotated[
        float, Field(gt=0, description="of the kernel; rows are scaled so that their mean square is d_model")
    ] = 0.5
    penalty: Annotated[float, Field(gt=0, description="weight of ((L0 / l0) - 1)^2")] = 0.5
    warm_up: Annotated[float, Field(ge=0, le=1, description="part of the training over which it grows")] = 0.1

    def make(self, width: int) -> Objective:
        """The objective."""
        return JumpReLU(width, target=self.l0, bandwidth=self.bandwidth, weight=self.penalty, warm_up=self.warm_up)


AnyActivation = Annotated[BatchTopKSettings | JumpReLUSettings, Field(discriminator="kind")]
"""Any activation that can be trained."""


class TrainingSettings(_Strict):
    """The autoencoder, and Adam (Kingma and Ba, 2015) on it."""

    width: Annotated[int, Field(ge=2, description="number of latents")]
    activation: AnyActivation
    epochs: Annotated[int, Field(ge=1, description="how often each row is seen")] = 10
    batch_rows: Annotated[int, Field(ge=16)] = 2048
    learning_rate: Annotated[
        float | None, Field(gt=0, description="left out: 2e-4 / sqrt(width / 2^14) (Gao et al., 2024)")
    ] = None
    warm_up: Annotated[float, Field(ge=0, lt=1, description="part of the steps with a growing rate")] = 0.02
    decay: Annotated[float, Field(ge=0, le=1, description="part of the steps with a falling one, to 0")] = 0.3
    dead_after: Annotated[int, Field(ge=1, description="rows without activity that make a latent dead")] = 100_000
    aux_weight: Annotated[float, Field(ge=0, description="of what dead latents explain of the rest")] = 1 / 32
    seed: Annotated[int, Field(ge=0, description="of the start and of the order of the rows")] = 0

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or _REFERENCE_RATE / math.sqrt(self.width / _REFERENCE_WIDTH)

    def factor(self, done: float) -> float:
        """What the learning rate is multiplied with when this part of the steps, 0 to 1, is done."""
        rising = min(done / self.warm_up, 1.0) if self.warm_up else 1.0
        falling = min((1 - done) / self.decay, 1.0) if self.decay else 1.0
        return min(rising, falling)
