"""Bring a latent of a sparse autoencoder up to a floor: rows in which it is as active or more stay as they are."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from probes.steering.base import Operator, Sign, SteerError, Update, Vector, latent_of


class RaiseLatent(Operator):
    """``h += max(0, floor - relu(x)) d``, d the latent's decoder row.

    This is the addition of SpARE (Zhao et al. 2024, arXiv:2410.15999). ``x`` is the latent before its threshold, so for
    a ReLU it is ``floor - act(h)``. Where a latent has a threshold above 0, rows with x between 0 and the threshold, in
    which it is not active, get x less than that.
    """

    kind = "raise_latent"
    of_latent: ClassVar[bool] = True
    floor: float = Field(gt=0, description="how active the latent is to be at least, in units of its code")

    @property
    def sign(self) -> Sign:
        """More of it."""
        return Sign.MORE

    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """See ``Operator.update``: with x less the floor, ``-x + x [x > 0]`` is the rest up to the floor.

        Below 0 the rest would grow beyond the floor; the limit of the dose keeps it there.

        Raises:
            SteerError: a row in which the latent is not active would need more than the dose that is allowed.
        """
        latent = latent_of(vector, self.kind)
        size = self.floor * latent.length
        if size > max_dose * vector.median_norm:
            raise SteerError(
                f"{self.kind!r} adds {size / vector.median_norm:.3g} median norms where the latent is not active, and "
                f"max_dose is {max_dose:g}. Lower the floor, or raise max_dose."
            )
        return Update(
            read=latent.read,
            write=vector.direction,
            limit=size,
            offset=latent.bias - self.floor,
            linear=-latent.length,
            rectified=latent.length,
        )
