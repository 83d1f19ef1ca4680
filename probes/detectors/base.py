"""What a detector is: directions to read at taps, arithmetic on the numbers read. Knows no engine and no request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from probes.taps import Tap

if TYPE_CHECKING:
    from probes.artifact import Artifact

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Directions:
    """What a detector reads at one tap: ``s @ weight + bias`` for the activation s of a row.

    Attributes:
        tap: where.
        weight: (d_model, k) float64, standardisation already folded in.
        bias: (k,) float64.
    """

    tap: Tap
    weight: Float64
    bias: Float64


def standardised(tap: Tap, weight: Float64, bias: Float64, *, mean: Float64, scale: Float64) -> Directions:
    """Directions that were fitted on ``(s - mean) / scale``, as directions on s itself: folded in float64.

    Args:
        tap: where they are read.
        weight: (k, d_model), in standardised units.
        bias: (k,).
        mean: (d_model,).
        scale: (d_model,), positive.
    """
    folded = np.ascontiguousarray((weight / scale).T)
    return Directions(tap, folded, bias - mean @ folded)


class Scorer(Protocol):
    """Turns the readouts of many rows into the scores of several detectors of one kind."""

    def __call__(self, readouts: npt.NDArray[np.floating]) -> Float64:
        """Map (n, width of the bank), as the engine wrote them, to (n, channels of all the detectors) float64.

        Wide rows hold the columns of all kinds: pick first, then convert.
        """
        ...


class Detector(ABC):
    """One trained detector. Subclasses live one to a file and are found by their ``kind``."""

    kind: ClassVar[str]
    score_is_readout: ClassVar[bool] = False
    """Whether a row's score is one number that was read of it, as it stands."""
    reads_norm: ClassVar[bool] = False
    """Whether the squared norm of the activation is wanted too: the last number of each tap."""
    aggregate_kind: ClassVar[str | None] = None
    """The one kind of aggregate that goes with this one; None: any that takes one number of a row."""
    may_block_alone: ClassVar[bool] = True
    """Whether a rule that stops requests may rest on this kind alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    @abstractmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """Build from loaded tensors and card.

        Raises:
            probes.artifact.ArtifactError: a tensor is missing, has the wrong shape or holds a NaN.
        """

    @property
    def channels(self) -> int:
        """Numbers that a row gives to an aggregate: 1, or as many as the one takes that goes with the kind."""
        return 1

    @abstractmethod
    def directions(self) -> Sequence[Directions]:
        """What to read, at most one entry per tap."""

    @abstractmethod
    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """Token scores from this detector's own readouts.

        Args:
            readouts: per tap (n, k) float64 in the order of ``directions``; with ``reads_norm`` (n, k + 1).
        Returns: (n,) float64, or (n, channels) where there are several.
        """

    def readout_limit(self, threshold: float) -> float | None:
        """Above which the one number that is read of a row lies exactly where its score lies above ``threshold``.

        Returns: None where no single number decides.
        """
        return threshold if self.score_is_readout else None

    def read(self, activations: Mapping[Tap, npt.NDArray[np.floating]]) -> dict[Tap, Float64]:
        """What an engine reads of activations, for ``score``.

        Args:
            activations: per tap (n, d_model).
        Returns: per tap (n, k) float64, or (n, k + 1).
        """
        found: dict[Tap, Float64] = {}
        for part in self.directions():
            rows = activations[part.tap].astype(np.float64)
            readout = rows @ part.weight + part.bias
            if self.reads_norm:
                readout = np.column_stack([readout, np.einsum("nd,nd->n", rows, rows)])
            found[part.tap] = readout
        return found

    @classmethod
    def scorer(cls, detectors: Sequence[Self], columns: Sequence[Mapping[Tap, npt.NDArray[np.intp]]]) -> Scorer:
        """One function that scores many detectors of this kind at once.

        A kind with a cheaper joint form overrides this; it must give the same numbers.

        Args:
            detectors: of this kind.
            columns: for each detector and tap, the columns of the bank's readouts that ``score`` is given.
        Returns: gives the channels of the first detector, then those of the next.
        """

        def score_each(readouts: npt.NDArray[np.floating]) -> Float64:
            parts = [
                detector.score({tap: readouts[:, index].astype(np.float64) for tap, index in places.items()})
                for detector, places in zip(detectors, columns, strict=True)
            ]
            return np.concatenate([part.reshape(len(readouts), -1) for part in parts], axis=1)

        return score_each
