"""A steering direction on disk: a safetensors file and, beside it, a JSON card that gives strengths their unit."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from probes.artifact import Stored, save_tensors
from probes.card import ArtifactCard, Digest
from probes.steering.base import Float64, Operator, Sign, Vector
from probes.taps import Site, Tap

DIRECTION = "direction"
"""Name of the tensor."""


class Safety(StrEnum):
    """What more of a direction does to the model's safety."""

    SAFER = "safer"
    """More refusals, or less harm, for one."""
    LESS_SAFE = "less_safe"
    NEUTRAL = "neutral"
    """It has nothing to do with safety: a language, a register, a topic."""


class SteerCard(ArtifactCard):
    """Everything that is known about one steering direction."""

    tap: str = Field(description="where it is written: resid_post.<layer>, after the layer")
    more_is: Safety = Field(description="what more of the direction does to the model's safety")
    median_norm: float = Field(gt=0, description="of the corpus's rows at the tap: the unit of strengths and doses")
    mean: float = Field(description="mean component of the corpus's rows along the direction")
    ceiling: float = Field(description="99th percentile of that component")
    corpus_rows: int = Field(gt=0, description="rows of ordinary text that these numbers rest on, sinks left out")
    corpus_digest: Digest

    @field_validator("tap")
    @classmethod
    def _written_to_the_stream(cls, tap: str) -> str:
        if Tap.parse(tap).site is not Site.RESID_POST:
            raise ValueError(f"is {tap!r}; what is written is the residual stream: resid_post.<layer>")
        return tap


class SteerArtifact(Stored[SteerCard]):
    """Direction and card."""

    card_type = SteerCard
    what = "steering direction"
    how = "telltale vector"

    @property
    def tap(self) -> Tap:
        """Where it is written."""
        return Tap.parse(self.card.tap)

    def steering_vector(self) -> Vector:
        """The direction, with what is known of ordinary rows along it.

        Raises:
            probes.artifact.ArtifactError: the tensor is missing, or of another shape than the model's.
            SteerError: it is not of length 1.
        """
        card = self.card
        direction: Float64 = self.vector(DIRECTION, card.model.d_model)
        return Vector(direction, median_norm=card.median_norm, mean=card.mean, ceiling=card.ceiling)

    @property
    def skip_first(self) -> int:
        """Leading positions that are never written to."""
        return self.card.skip_first

    def lowers_safety(self, sign: Sign) -> bool:
        """Whether an operator of this sign makes the model less safe."""
        return lowers_safety(self.card.more_is, sign)

    def unsafe(self, operator: Operator) -> str | None:
        """See ``probes.steering.steer.Steerable``."""
        if not any(self.lowers_safety(sign) for sign in operator.signs):
            return None
        change = "less" if operator.sign < 0 else "more"
        return (
            f"{operator.kind!r} makes {change} of {self.card.name!r}, of which more is {self.card.more_is.value!r} by "
            "its card: the model would become less safe."
        )


def lowers_safety(more_is: Safety, sign: Sign) -> bool:
    """Whether a change of this sign makes the model less safe."""
    return (more_is, sign) in {(Safety.SAFER, Sign.LESS), (Safety.LESS_SAFE, Sign.MORE)}


def save_steer(path: Path, card: SteerCard, direction: npt.NDArray[np.floating]) -> SteerArtifact:
    """Write a direction of length 1 and its card.

    Raises:
        probes.artifact.ArtifactError: the path does not end in ``.safetensors``.
    """
    tensors: Mapping[str, npt.NDArray[np.generic]] = {DIRECTION: direction.astype(np.float32)}
    return SteerArtifact(path=path, card=save_tensors(path, card, tensors), tensors=tensors)
