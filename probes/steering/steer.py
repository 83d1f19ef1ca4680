"""A steer: a direction, an operator and the rows that it may write to. Knows no engine and no request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from probes.steering.base import Operator, SteerError, Update, Vector
from probes.taps import Tap

END: Final = 2**31 - 1
"""Behind every position."""


class Positions(StrEnum):
    """Which rows of a request are written to; never those of a sink."""

    PROMPT = "prompt"
    GENERATED = "generated"
    ALL = "all"


class Steerable(Protocol):
    """What can be written along: a steering direction, or a latent of a sparse autoencoder."""

    @property
    def tap(self) -> Tap:
        """Where it is written."""
        ...

    @property
    def skip_first(self) -> int:
        """Leading positions that are never written to."""
        ...

    def unsafe(self, operator: Operator) -> str | None:
        """Why an operator may not be used without leave to make the model less safe; None if it may."""
        ...

    def steering_vector(self) -> Vector:
        """The direction, with what is known of ordinary rows along it.

        Raises:
            SteerError: nothing can be written along it.
            probes.artifact.ArtifactError: it is damaged.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Steer:
    """What is written to a request's rows while it is steered.

    Attributes:
        name: as in the policy file.
        tap: after which layer.
        update: of a row, at the strength of the policy file.
        positions: which rows.
        skip_first: leading positions that are never written to.
        unit: the stream's median norm: doses are told in it.
        strength: of the operator; None if it has none.
    """

    name: str
    tap: Tap
    update: Update
    positions: Positions
    skip_first: int
    unit: float
    strength: float | None = None

    def span(self, num_prompt: int) -> tuple[int, int]:
        """The first position that may be written to, and the one behind the last.

        Args:
            num_prompt: prompt tokens of the request.
        """
        start = num_prompt if self.positions is Positions.GENERATED else 0
        stop = num_prompt if self.positions is Positions.PROMPT else END
        return max(start, self.skip_first), stop

    def digest(self) -> str:
        """SHA-256 over all that decides what is written where: equal for steers that do the same."""
        update = self.update
        terms = (update.limit, update.offset, update.constant, update.linear, update.rectified, update.threshold)
        digest = hashlib.sha256(f"{self.tap}:{self.positions.value}:{self.skip_first}:{terms}".encode())
        digest.update(np.ascontiguousarray(update.read).tobytes())
        digest.update(np.ascontiguousarray(update.write).tobytes())
        return digest.hexdigest()


def make_steer(
    name: str,
    artifact: Steerable,
    operator: Operator,
    *,
    positions: Positions,
    max_dose: float,
    allow_safety_reducing: bool,
) -> Steer:
    """Join a direction and an operator.

    Args:
        name: as in the policy file.
        artifact: the direction.
        operator: with its strength.
        positions: which rows.
        max_dose: largest change of a row, in units of the stream's median norm.
        allow_safety_reducing: whether it may make the model less safe.
    Raises:
        SteerError: it would make the model less safe and may not, exceeds ``max_dose``, or the direction cannot be
            used.
    """
    problem = None if allow_safety_reducing else artifact.unsafe(operator)
    if problem is not None:
        raise SteerError(f"{problem} If that is what you want, say allow_safety_reducing: true.")
    vector = artifact.steering_vector()
    update = operator.update(vector, max_dose=max_dose)
    if abs(update.constant) > update.limit:
        raise SteerError(
            f"{operator.kind!r} adds {abs(update.constant) / vector.median_norm:.3g} median norms to every row, and "
            f"max_dose is {max_dose:g}: no row would ever get what is asked for. Lower the strength, or raise max_dose."
        )
    strength = getattr(operator, "strength", None)
    return Steer(name, artifact.tap, update, positions, artifact.skip_first, vector.median_norm, strength)


@dataclass(frozen=True, slots=True, eq=False)
class SteerMatrix:
    """What the engine multiplies with where K steers write after one layer.

    Attributes:
        tap: where.
        columns: (K,) positions of these steers in the plan's list.
        read: (d_model, K) float32.
        terms: (6, K) float32: offset, constant, linear, rectified, threshold, limit.
        write: (K, d_model) float32.
    """

    tap: Tap
    columns: tuple[int, ...]
    read: npt.NDArray[np.float32]
    terms: npt.NDArray[np.float32]
    write: npt.NDArray[np.float32]


def stack_steers(steers: Sequence[Steer], *, d_model: int, num_layers: int) -> tuple[SteerMatrix, ...]:
    """One matrix for each layer that is written to, in their order.

    Raises:
        SteerError: a direction has another width than the model, or a layer does not exist.
    """
    for steer in steers:
        if steer.update.read.shape != (d_model,) or steer.tap.layer >= num_layers:
            raise SteerError(
                f"steer {steer.name!r} writes {len(steer.update.read)} dimensions after {steer.tap}; the model has "
                f"{d_model} and the layers 0 to {num_layers - 1}. It belongs to another model."
            )
    numbers = sorted(range(len(steers)), key=lambda number: (steers[number].tap, number))
    found = []
    for tap, group in groupby(numbers, key=lambda number: steers[number].tap):
        columns = tuple(group)
        updates = [steers[number].update for number in columns]
        terms = [
            [update.offset, update.constant, update.linear, update.rectified, update.threshold, update.limit]
            for update in updates
        ]
        found.append(
            SteerMatrix(
                tap,
                columns,
                np.stack([update.read for update in updates], axis=1).astype(np.float32),
                np.array(terms, dtype=np.float32).T.copy(),
                np.stack([update.write for update in updates]).astype(np.float32),
            )
        )
    return tuple(found)
