"""Cap a latent of a sparse autoencoder: rows in which it is more active are brought back, all others stay."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from probes.steering.base import Operator, Sign, Update, Vector, latent_of


class CapLatent(Operator):
    """``h -= strength max(0, act(h) - ceiling) d``, d the latent's decoder row: exactly nothing below the ceiling."""

    kind = "cap_latent"
    of_latent: ClassVar[bool] = True
    ceiling: float = Field(ge=0, description="how active the latent may be, in units of its code")
    strength: float = Field(default=1.0, gt=0, le=1, description="share of what lies above the ceiling that goes")

    @property
    def sign(self) -> Sign:
        """Less of it."""
        return Sign.LESS

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """See ``Operator.update``: x stands for the code less the ceiling, which counts where the latent is active."""
        latent = latent_of(vector, self.kind)
        return Update(
            read=latent.read,
            write=vector.direction,
            limit=max_dose * vector.median_norm,
            offset=latent.bias - self.ceiling,
            rectified=-self.strength * latent.length,
            threshold=max(latent.threshold - self.ceiling, 0.0),
        )
