"""Take a direction out, to what ordinary text has of it (affine ablation)."""

from __future__ import annotations

from pydantic import Field

from probes.steering.base import Operator, Sign, Update, Vector


class Ablate(Operator):
    """``h -= strength (v.h - mean) v``: at strength 1 each row has the mean component, at less it comes nearer."""

    kind = "ablate"
    strength: float = Field(default=1.0, gt=0, le=1, description="share of the difference that is taken away")

    @property
    def sign(self) -> Sign:
        """Less of it, wherever there was more than usual."""
        return Sign.LESS

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """See ``Operator.update``."""
        return Update(
            read=vector.direction,
            write=vector.direction,
            limit=max_dose * vector.median_norm,
            offset=-vector.mean,
            linear=-self.strength,
        )
