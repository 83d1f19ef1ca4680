"""The bank: the directions of all detectors, one matrix per tap, and who owns which column. Knows no engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from probes.columns import Room, direction_digest
from probes.detectors import Detector
from probes.detectors.base import Directions, Float64, Scorer
from probes.errors import TelltaleError
from probes.taps import Tap

Entry = tuple[int, str]
"""A column of a row of readouts, and the digest of what stands there."""


class BankError(TelltaleError, ValueError):
    """The directions do not fit the model or the reserved capacity."""


@dataclass(frozen=True, slots=True)
class TapMatrix:
    """What the engine multiplies with at one tap.

    Attributes:
        tap: where.
        weight: (d_model, capacity) float32; unused columns are zero.
        bias: (capacity,) float32.
        columns: (used,) those that hold a direction, rising.
    """

    tap: Tap
    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    columns: npt.NDArray[np.intp]

    @property
    def used(self) -> int:
        """How many columns hold a direction."""
        return len(self.columns)

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
        room: of an engine that runs, whose taps are fixed and in whose columns directions stand already. Without it,
            the bank's own taps, filled from the first column on.
    Raises:
        BankError: a direction has another width, a tap lies beyond the last layer, two detectors have one name, or
            the capacity does not suffice.
        probes.columns.NoRoomError: the engine that runs has not the tap, or no free column.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        *,
        d_model: int,
        num_layers: int,
        capacity: int,
        room: Room | None = None,
    ) -> None:
        self.detectors = tuple(detectors)
        self.d_model = d_model
        self.capacity = capacity
        names = [detector.name for detector in self.detectors]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise BankError(f"two detectors are named {duplicates[0]!r}. Give one of them another 'name'.")
        read = self._read(num_layers)
        self.taps: tuple[Tap, ...] = room.taps if room is not None else tuple(sorted(read))
        offsets = self._offsets(read, room)
        self.matrices: tuple[TapMatrix, ...] = tuple(self._stack(tap, read.get(tap, ()), offsets) for tap in self.taps)
        self.columns: Mapping[str, Mapping[Tap, npt.NDArray[np.intp]]] = self._columns(read, offsets)
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
            np.concatenate([i * step + matrix.columns, [i * step + self.capacity]])
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
        """SHA-256 over detectors and what they read: the same wherever in an engine's columns they stand."""
        digest = hashlib.sha256(f"{self.d_model}:{self.capacity};".encode())
        for detector in self.detectors:
            digest.update(f"{detector.kind}:{detector.name};".encode())
            for tap, columns in sorted(self.columns[detector.name].items()):
                digest.update(f"{tap}:{','.join(self.direction_digests(tap, columns))};".encode())
        return digest.hexdigest()

    def direction_digests(self, tap: Tap, columns: npt.NDArray[np.intp]) -> list[str]:
        """What stands in some columns of a tap, as ``probes.columns.direction_digest`` names it.

        Args:
            tap: of the bank.
            columns: (k,) of a row of readouts.
        """
        number = self.taps.index(tap)
        matrix, offsets = self.matrices[number], columns - number * (self.capacity + 1)
        return [direction_digest(tap, matrix.weight[:, offset], matrix.bias[offset]) for offset in offsets]

    def residents(self) -> dict[Tap, dict[int, str]]:
        """By tap and column, counted from the tap's first, the digest of the direction that stands there."""
        found = {}
        for number, matrix in enumerate(self.matrices):
            places = matrix.columns + number * (self.capacity + 1)
            digests = self.direction_digests(matrix.tap, places)
            found[matrix.tap] = dict(zip(matrix.columns.tolist(), digests, strict=True))
        return found

    def entries(self) -> tuple[Entry, ...]:
        """What means something in a row of readouts: directions, and the norm at each tap."""
        found: list[Entry] = []
        for tap, columns in self.residents().items():
            norm = self.norm_column(tap)
            found += [(norm - self.capacity + column, digest) for column, digest in columns.items()]
            found.append((norm, "norm"))
        return tuple(found)

    def _read(self, num_layers: int) -> dict[Tap, list[tuple[str, Directions]]]:
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

    def _offsets(
        self, read: Mapping[Tap, Sequence[tuple[str, Directions]]], room: Room | None
    ) -> dict[tuple[str, Tap], npt.NDArray[np.intp]]:
        """Columns of each detector at each of its taps, counted from the tap's first."""
        offsets = {}
        for tap, entries in read.items():
            places = room.places(tap, self.capacity) if room is not None else None
            start = 0
            for name, directions in entries:
                if places is not None:
                    found = places.take(directions)
                else:
                    found = np.arange(start, start + directions.weight.shape[1], dtype=np.intp)
                    start += len(found)
                offsets[name, tap] = found
        return offsets

    def _stack(
        self,
        tap: Tap,
        entries: Sequence[tuple[str, Directions]],
        offsets: Mapping[tuple[str, Tap], npt.NDArray[np.intp]],
    ) -> TapMatrix:
        weight = np.zeros((self.d_model, self.capacity), dtype=np.float32)
        bias = np.zeros(self.capacity, dtype=np.float32)
        for name, directions in entries:
            weight[:, offsets[name, tap]] = directions.weight
            bias[offsets[name, tap]] = directions.bias
        used = [offsets[name, tap] for name, _ in entries]
        columns = np.unique(np.concatenate(used)) if used else np.empty(0, dtype=np.intp)
        return TapMatrix(tap, weight, bias, columns)

    def _columns(
        self,
        read: Mapping[Tap, Sequence[tuple[str, Directions]]],
        offsets: Mapping[tuple[str, Tap], npt.NDArray[np.intp]],
    ) -> Mapping[str, Mapping[Tap, npt.NDArray[np.intp]]]:
        columns: dict[str, dict[Tap, npt.NDArray[np.intp]]] = {detector.name: {} for detector in self.detectors}
        for position, tap in enumerate(self.taps):
            for name, _ in read.get(tap, ()):
                columns[name][tap] = offsets[name, tap] + position * (self.capacity + 1)
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
