"""What a steer does to a row: one gated update of rank one. Knows no engine, no request and no policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from probes.errors import TelltaleError

Float64 = npt.NDArray[np.float64]

UNIT_TOLERANCE = 1e-3
"""How far a direction's length may be from 1."""


class SteerError(TelltaleError, ValueError):
    """A direction or a strength that nothing can be steered with."""


class Sign(IntEnum):
    """Whether an operator makes more or less of what its direction stands for."""

    LESS = -1
    MORE = 1


@dataclass(frozen=True, slots=True, eq=False)
class Latent:
    """How active a latent of a sparse autoencoder is, for a direction that is its decoder row.

    ``act(s) = x where x > threshold, else 0``, with ``x = s.read + bias``; the row holds ``act(s) length`` of it along
    the direction.

    Attributes:
        read: (d_model,) float64, its encoder row.
        bias: added to the product.
        threshold: 0 or more.
        length: of its decoder row.
    """

    read: Float64
    bias: float
    threshold: float
    length: float


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """A direction at one tap, and what is known of ordinary rows along it.

    Attributes:
        direction: (d_model,) float64, of length 1.
        median_norm: of the stream's rows over non-sink positions of ordinary text: the unit of strengths and doses.
        mean: mean component along the direction over such rows.
        ceiling: the component that ordinary rows seldom exceed (their 99th percentile).
        latent: what the direction is the decoder row of; None for any other direction.

    Raises:
        SteerError: the direction is not of length 1, or a number is not finite or has the wrong sign.
    """

    direction: Float64
    median_norm: float
    mean: float
    ceiling: float
    latent: Latent | None = None

    def __post_init__(self) -> None:
        """Refuse what would steer by another dose than it says."""
        length = float(np.linalg.norm(self.direction))
        if not abs(length - 1.0) <= UNIT_TOLERANCE:
            raise SteerError(
                f"the direction has the length {length:.6g}; it must be 1 within {UNIT_TOLERANCE}: strengths are in "
                "units of the stream's norm. Divide it by its length."
            )
        if not (np.isfinite(self.median_norm) and self.median_norm > 0):
            raise SteerError(f"the median norm is {self.median_norm}; it must be a finite number above 0.")
        for name in ("mean", "ceiling"):
            if not np.isfinite(getattr(self, name)):
                raise SteerError(f"the {name} along the direction is {getattr(self, name)}; it must be finite.")


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """``h += clip(constant + linear x + rectified x [x > threshold]) write``, where ``x = s.read + offset``.

    Any operator is brought to this form, so that the engine has one small product for all of them at a tap. ``s`` is
    the stream before any write at the tap: several updates are parallel.

    Attributes:
        read: (d_model,) float64.
        write: (d_model,) float64, of length 1: the coefficient's size is the dose.
        limit: the largest dose.
        offset: added to the product.
        constant, linear, rectified, threshold: of the coefficient.
    """

    read: Float64
    write: Float64
    limit: float
    offset: float = 0.0
    constant: float = 0.0
    linear: float = 0.0
    rectified: float = 0.0
    threshold: float = 0.0

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        return len(self.read)

    def coefficient(self, stream: Float64) -> Float64:
        """What a row gets along ``write``.

        Args:
            stream: (n, d_model).
        Returns: (n,); its absolute value is the dose, in the stream's own units.
        """
        x = stream @ self.read + self.offset
        rectified = np.where(x > self.threshold, x, 0.0)
        value = self.constant + self.linear * x + self.rectified * rectified
        return np.clip(value, -self.limit, self.limit)

    def apply(self, stream: Float64, where: npt.NDArray[np.bool_]) -> tuple[Float64, Float64]:
        """The definition that every engine is held to.

        Args:
            stream: (n, d_model).
            where: (n,), the rows that are written to.
        Returns: the new stream; (n,) the dose of each row, 0 where nothing was written.
        """
        coefficient = np.where(where, self.coefficient(stream), 0.0)
        return stream + coefficient[:, None] * self.write, np.abs(coefficient)


class Operator(BaseModel, ABC):
    """A way of writing along a direction. One file per operator, found by its ``kind``.

    The fields of a subclass are its parameters; they appear in the policy file's schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: ClassVar[str]
    of_latent: ClassVar[bool] = False
    """Whether it writes to a latent of a sparse autoencoder, rather than along any direction."""

    @property
    @abstractmethod
    def sign(self) -> Sign:
        """Whether there will be more or less of what the direction stands for."""

    @property
    def signs(self) -> frozenset[Sign]:
        """What it may make of a row: more, less, or either."""
        return frozenset({self.sign})

    @abstractmethod
    def update(self, vector: Vector, *, max_dose: float) -> Update:
        """The update of a row.

        Args:
            vector: what to write along.
            max_dose: largest change of a row, in units of ``vector.median_norm``.
        """


def latent_of(vector: Vector, kind: str) -> Latent:
    """The latent that an operator writes to.

    Raises:
        SteerError: the direction is no decoder row.
    """
    if vector.latent is None:
        raise SteerError(f"{kind!r} writes to a latent: name one with 'sae' and 'latent' in the place of 'artifact'.")
    return vector.latent
