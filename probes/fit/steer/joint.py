"""Several steers at one tap, written together as the engine writes them: each reads the stream before any writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from probes.steering.base import Float64, SteerError, Update
from probes.steering.steer import Steer
from probes.taps import Tap

__all__ = ["JointSteer", "JointUpdate", "join"]


@dataclass(frozen=True, slots=True, eq=False)
class JointUpdate:
    """The sum of several updates of a row.

    Attributes:
        parts: at least one.
        along: (d_model,) of length 1: a row is moved along it in the place of its own way, as far as by the sum; None
            for the sum itself. So a random direction gets each row's own dose.
    """

    parts: tuple[Update, ...]
    along: Float64 | None = None

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        return self.parts[0].d_model

    def apply(self, stream: Float64, where: npt.NDArray[np.bool_]) -> tuple[Float64, Float64]:
        """The new stream, and the length of each row's change; see ``Update.apply``."""
        change = np.zeros_like(stream)
        for part in self.parts:
            change += np.where(where, part.coefficient(stream), 0.0)[:, None] * part.write
        dose: Float64 = np.linalg.norm(change, axis=1)
        return stream + (change if self.along is None else dose[:, None] * self.along), dose


@dataclass(frozen=True, slots=True, eq=False)
class JointSteer:
    """Several steers as one; implements ``probes.fit.steer.writes.Writes``.

    Attributes:
        name: of them together.
        first: whose rows are written to, and whose unit doses are told in.
        update: of a row.
        strength: what their levels were multiplied by.
    """

    name: str
    first: Steer
    update: JointUpdate
    strength: float

    @property
    def tap(self) -> Tap:
        """After which layer."""
        return self.first.tap

    @property
    def unit(self) -> float:
        """The stream's median norm."""
        return self.first.unit

    def span(self, num_prompt: int) -> tuple[int, int]:
        """See ``Steer.span``."""
        return self.first.span(num_prompt)

    def at_random(self, generator: np.random.Generator) -> JointSteer:
        """The same dose for every row, along one random direction."""
        drawn = generator.standard_normal(self.update.d_model)
        return replace(self, update=replace(self.update, along=drawn / np.linalg.norm(drawn)))


def join(name: str, steers: Sequence[Steer], *, strength: float) -> JointSteer:
    """Write steers together.

    Args:
        name: of them together.
        steers: at least one.
        strength: what their levels were multiplied by.
    Raises:
        SteerError: there are none, or they write after different layers or to different rows.
    """
    if not steers:
        raise SteerError("there is no steer to be written.")
    places = {(steer.tap, steer.positions, steer.skip_first) for steer in steers}
    if len(places) > 1:
        raise SteerError(f"{name!r}: its steers write after different layers, or to different rows. Judge them apart.")
    return JointSteer(name, steers[0], JointUpdate(tuple(steer.update for steer in steers)), strength)
