"""The bank: the directions of all detectors, one matrix per tap, and who owns which column. Knows no engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from probes.detectors import Detector
from probes.detectors.base import Directions, Float64, Scorer
from probes.errors import TelltaleError
from probes.taps import Tap


class BankError(TelltaleError, ValueError):
    """The directions do not fit the model or the reserved capacity."""


@dataclass(frozen=True, slots=True)
class TapMatrix:
    """What the engine multiplies with at one tap.

    Attributes:
        tap: where.
        weight: (d_model, capacity) float32; unused columns are zero.
        bias: (capacity,) float32.
        used: columns that hold a direction.
    """

    tap: Tap
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    used: int

    def digest(self) -> str:
        """SHA-256 over what the engine multiplies with: the same for a copy that is read back from a device."""
        digest = hashlib.sha256(f"{self.tap}:{self.weight.shape};".encode())
        digest.update(np.ascontiguousarray(self.weight).tobytes())
        digest.update(np.ascontiguousarray(self.bias).tobytes())
        return digest.hexdigest()


class Bank:
    """The directions of several detectors, stacked.

    ``index`` says in which column of the scores a detector's first channel stands, ``columns`` where its readouts do.

    A row of readouts has, for each tap in order, ``capacity`` products and then the squared norm of the activation:
    ``width = num_taps * (capacity + 1)``. A detector's columns never move while it is loaded.

    Args:
        detectors: with distinct names.
        d_model: width of the residual stream.
        num_layers: decoder layers of the model.
        capacity: columns reserved at each tap.
    Raises:
        BankError: a direction has another width, a tap lies beyond the last layer, two detectors have one name, or
            the capacity does not suffice.
    """

    def __init__(self, detectors: Sequence[Detector], *, d_model: int, num_layers: int, capacity: int) -> None:
        self.detectors = tuple(detectors)
        self.d_model = d_model
        self.capacity = capacity
        names = [detector.name for detector in self.detectors]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise BankError(f"two detectors are named {duplicates[0]!r}. Give one of them another 'name'.")
        placed = self._place(num_layers)
        self.matrices: tuple[TapMatrix, ...] = tuple(self._stack(tap, placed[tap]) for tap in sorted(placed))
        self.taps: tuple[Tap, ...] = tuple(matrix.tap for matrix in self.matrices)
        self.columns: Mapping[str, Mapping[Tap, npt.NDArray[np.intp]]] = self._columns(placed)
        ends = np.cumsum([detector.channels for detector in self.detectors], dtype=np.intp).tolist()
        self.index: Mapping[str, int] = MappingProxyType(dict(zip(names, [0, *ends], strict=False)))
        self.num_scores: int = ends[-1] if ends else 0
        self._named = MappingProxyType(dict(zip(names, self.detectors, strict=True)))
        self._scorers = self._group()

    @property
    def width(self) -> int:
        """Numbers in a row of readouts."""
        return len(self.matrices) * (self.capacity + 1)

    def detector(self, name: str) -> Detector:
        """The one of this name."""
        return self._named[name]

    def norm_column(self, tap: Tap) -> int:
        """The column of a readout row that holds ``|s|^2`` at ``tap``."""
        return self.taps.index(tap) * (self.capacity + 1) + self.capacity

    def used_columns(self) -> npt.NDArray[np.intp]:
        """Columns that hold a direction or a norm: those whose values mean something."""
        step = self.capacity + 1
        parts = [
            np.concatenate([np.arange(i * step, i * step + matrix.used), [i * step + self.capacity]])
            for i, matrix in enumerate(self.matrices)
        ]
        return np.concatenate(parts).astype(np.intp) if parts else np.empty(0, dtype=np.intp)

    def score(self, readouts: npt.NDArray[np.floating]) -> Float64:
        """Scores of every detector for every row.

        Args:
            readouts: (n, width), as the engine wrote them.
        Returns: (n, ``num_scores``) float64: the channels of each detector, in the order of ``detectors``.
        """
        scores: Float64 | None = None
        for places, scorer in self._scorers:
            found = scorer(readouts)
            if len(self._scorers) == 1:
                return found
            if scores is None:
                scores = np.empty((self.num_scores, len(readouts)), dtype=np.float64).T
            scores[:, places] = found
        return scores if scores is not None else np.empty((len(readouts), 0), dtype=np.float64)

    def digest(self) -> str:
        """SHA-256 over taps, weights and owners: equal in every process that serves the same bank."""
        digest = hashlib.sha256()
        for matrix in self.matrices:
            digest.update(f"{matrix.tap}:{matrix.weight.shape}:{matrix.used};".encode())
            digest.update(matrix.weight.tobytes())
            digest.update(matrix.bias.tobytes())
        digest.update(",".join(f"{detector.kind}:{detector.name}" for detector in self.detectors).encode())
        return digest.hexdigest()

    def _place(self, num_layers: int) -> dict[Tap, list[tuple[str, Directions]]]:
        placed: dict[Tap, list[tuple[str, Directions]]] = {}
        for detector in self.detectors:
            read = [directions.tap for directions in detector.directions()]
            if len(set(read)) != len(read):
                raise BankError(
                    f"detector {detector.name!r} lists a tap twice; its directions at a tap belong together."
                )
            for directions in detector.directions():
                if directions.weight.shape[0] != self.d_model:
                    raise BankError(
                        f"detector {detector.name!r} reads {directions.weight.shape[0]} dimensions at "
                        f"{directions.tap}; the model has {self.d_model}. It belongs to another model."
                    )
                if directions.tap.layer >= num_layers:
                    raise BankError(
                        f"detector {detector.name!r} reads {directions.tap}; the model's layers are 0 to "
                        f"{num_layers - 1}."
                    )
                placed.setdefault(directions.tap, []).append((detector.name, directions))
        for tap, entries in placed.items():
            needed = sum(directions.weight.shape[1] for _, directions in entries)
            if needed > self.capacity:
                raise BankError(
                    f"{tap}: the detectors need {needed} directions, {self.capacity} are reserved. "
                    f"Set reserve.directions to {needed} or more."
                )
        return placed

    def _stack(self, tap: Tap, entries: Sequence[tuple[str, Directions]]) -> TapMatrix:
        weight = np.zeros((self.d_model, self.capacity), dtype=np.float32)
        bias = np.zeros(self.capacity, dtype=np.float32)
        used = 0
        for _, directions in entries:
            end = used + directions.weight.shape[1]
            weight[:, used:end] = directions.weight
            bias[used:end] = directions.bias
            used = end
        return TapMatrix(tap, weight, bias, used)

    def _columns(
        self, placed: Mapping[Tap, Sequence[tuple[str, Directions]]]
    ) -> Mapping[str, Mapping[Tap, npt.NDArray[np.intp]]]:
        columns: dict[str, dict[Tap, npt.NDArray[np.intp]]] = {detector.name: {} for detector in self.detectors}
        for position, tap in enumerate(self.taps):
            start = position * (self.capacity + 1)
            for name, directions in placed[tap]:
                end = start + directions.weight.shape[1]
                columns[name][tap] = np.arange(start, end, dtype=np.intp)
                start = end
        return MappingProxyType(columns)

    def _group(self) -> tuple[tuple[npt.NDArray[np.intp], Scorer], ...]:
        by_class: dict[type[Detector], list[Detector]] = {}
        for detector in self.detectors:
            by_class.setdefault(type(detector), []).append(detector)
        groups = []
        for cls, members in by_class.items():
            places = [np.arange(member.channels) + self.index[member.name] for member in members]
            scorer = cls.scorer(members, [self._given(member) for member in members])
            groups.append((np.concatenate(places).astype(np.intp), scorer))
        return tuple(groups)

    def _given(self, detector: Detector) -> Mapping[Tap, npt.NDArray[np.intp]]:
        """The columns of the readouts that a detector scores with."""
        own = self.columns[detector.name]
        if not detector.reads_norm:
            return own
        return {tap: np.append(index, self.norm_column(tap)) for tap, index in own.items()}
