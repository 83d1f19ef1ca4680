"""Cap a direction: rows that have more of it than ordinary text are brought back, all others stay as they are."""

from __future__ import annotations

from pydantic import Field

from probes.steering.base import Operator, Sign, Update, Vector


class Cap(Operator):
    """``h -= strength max(0, v.h - ceiling) v``: exactly nothing below the ceiling."""

    kind = "cap"
    strength: float = Field(default=1.0, gt=0, le=1, description="share of what lies above the ceiling that goes")

    @property
    def sign(self) -> Sign:
        """Less of it."""
        return Sign.LESS

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """See ``Operator.update``."""
        return Update(
            read=vector.direction,
            write=vector.direction,
            limit=max_dose * vector.median_norm,
            offset=-vector.ceiling,
            rectified=-self.strength,
        )
