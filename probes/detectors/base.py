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


class Scorer(Protocol):
    """Turns the readouts of many rows into the scores of several detectors of one kind."""

    def __call__(self, readouts: npt.NDArray[np.floating]) -> Float64:
        """Map (n, width of the bank), as the engine wrote them, to (n, number of detectors) float64.

        Wide rows hold the columns of all kinds: pick first, then convert.
        """
        ...


class Detector(ABC):
    """One trained detector. Subclasses live one to a file and are found by their ``kind``."""

    kind: ClassVar[str]
    score_is_readout: ClassVar[bool] = False
    """Whether a row's score is one number that was read of it, as it stands."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    @abstractmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> Self:
        """Build from loaded tensors and card.

        Raises:
            probes.artifact.ArtifactError: a tensor is missing, has the wrong shape or holds a NaN.
        """

    @abstractmethod
    def directions(self) -> Sequence[Directions]:
        """What to read, at most one entry per tap."""

    @abstractmethod
    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        """Token scores from this detector's own readouts.

        Args:
            readouts: per tap (n, k) float64 in the order of ``directions``.
        Returns: (n,) float64.
        """

    @classmethod
    def scorer(cls, detectors: Sequence[Self], columns: Sequence[Mapping[Tap, npt.NDArray[np.intp]]]) -> Scorer:
        """One function that scores many detectors of this kind at once.

        A kind with a cheaper joint form overrides this; it must give the same numbers.

        Args:
            detectors: of this kind.
            columns: for each detector and tap, the columns of the bank's readouts that hold its directions.
        """

        def score_each(readouts: npt.NDArray[np.floating]) -> Float64:
            parts = [
                detector.score({tap: readouts[:, index].astype(np.float64) for tap, index in places.items()})
                for detector, places in zip(detectors, columns, strict=True)
            ]
            return np.stack(parts, axis=1)

        return score_each
