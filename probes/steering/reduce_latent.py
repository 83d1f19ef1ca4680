"""Take a part of a latent of a sparse autoencoder away, and never more than there is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from probes.steering.base import Operator, Sign, Update, Vector, latent_of


class ReduceLatent(Operator):
    """``h -= min(act(h), by) d``, d the latent's decoder row.

    This is the removal of SpARE (Zhao et al. 2024, arXiv:2410.15999). Rows in which the latent is not active stay as
    they are.
    """

    kind = "reduce_latent"
    of_latent: ClassVar[bool] = True
    by: float = Field(gt=0, description="what is taken away at most, in units of the latent's code")

    @property
    def sign(self) -> Sign:
        """Less of it."""
        return Sign.LESS

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """See ``Operator.update``: the limit of the dose is that of the removal."""
        latent = latent_of(vector, self.kind)
        return Update(
            read=latent.read,
            write=vector.direction,
            limit=min(max_dose * vector.median_norm, self.by * latent.length),
            offset=latent.bias,
            rectified=-latent.length,
            threshold=latent.threshold,
        )
