"""Add a direction (ActAdd, CAA, representation engineering)."""

from __future__ import annotations

from pydantic import Field, field_validator

from probes.steering.base import Operator, Sign, Update, Vector


class Add(Operator):
    """``h += strength median_norm v``: the same for every row, whatever it holds; negative strengths take away."""

    kind = "add"
    strength: float = Field(ge=-2, le=2, description="in units of the median residual norm; 0.05 to 0.3 is usual")

    @field_validator("strength")
    @classmethod
    def _does_something(cls, strength: float) -> float:
        if strength == 0:
            raise ValueError("a strength of 0 changes nothing: leave the steer out")
        return strength

    @property
    def sign(self) -> Sign:
        """By the strength."""
        return Sign.MORE if self.strength > 0 else Sign.LESS

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """See ``Operator.update``."""
        return Update(
            read=vector.direction,
            write=vector.direction,
            limit=max_dose * vector.median_norm,
            constant=self.strength * vector.median_norm,
        )
