"""Set a latent of a sparse autoencoder to a value, whatever it was; all that it does not explain stays."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from probes.steering.base import Operator, Sign, Update, Vector, latent_of


class SetLatent(Operator):
    """``h += strength (target - act(h)) d``, d the latent's decoder row: the reconstruction error is kept.

    The clamp of Templeton et al. (2024, "Scaling Monosemanticity"). A target of 0 takes the latent out.
    """

    kind = "set_latent"
    of_latent: ClassVar[bool] = True
    target: float = Field(ge=0, description="what the latent is set to, in units of its code; 0 takes it out")
    strength: float = Field(default=1.0, gt=0, le=1, description="share of the difference that is made up")

    @property
    def sign(self) -> Sign:
        """More of it, unless it is taken out."""
        return Sign.MORE if self.target > 0 else Sign.LESS

    @property
    def signs(self) -> frozenset[Sign]:
        """Rows that had more than the target get less."""
        return frozenset({Sign.LESS, self.sign})

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """See ``Operator.update``."""
        latent = latent_of(vector, self.kind)
        size = self.strength * latent.length
        return Update(
            read=latent.read,
            write=vector.direction,
            limit=max_dose * vector.median_norm,
            offset=latent.bias,
            constant=size * self.target,
            rectified=-size,
            threshold=latent.threshold,
        )
