"""The rows of many requests at one tap, request by request: what is fitted where single tokens count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from probes.errors import TelltaleError

__all__ = ["Sequences", "SequencesError"]

Float32 = npt.NDArray[np.float32]


class SequencesError(TelltaleError, ValueError):
    """Rows and requests do not fit each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Requests of different lengths: runs of rows of one array.

    Attributes:
        rows: (any, d_model), activations; may be a memory map.
        starts: (n,) int64, the first row of each request.
        ends: (n,) int64, the row behind its last; above its start.
    """

    rows: npt.NDArray[np.floating]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, requests: Iterable[npt.NDArray[np.floating]]) -> Sequences:
        """From (tokens, d_model) arrays.

        Raises:
            SequencesError: there is none, or one has no row.
        """
        parts = list(requests)
        lengths = [len(part) for part in parts]
        if not lengths or min(lengths) < 1:
            raise SequencesError(
                f"{len(parts)} requests were given, {lengths.count(0)} of them without a row. Leave out those that "
                "are too short to be read."
            )
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(np.concatenate(parts), ends - np.array(lengths, dtype=np.int64), ends)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[npt.NDArray[np.floating]]:
        for start, end in zip(self.starts, self.ends, strict=True):
            yield self.rows[start:end]

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return int(self.rows.shape[1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) rows of each request."""
        return self.ends - self.starts

    def some(self, index: Sequence[int] | npt.NDArray[np.int64]) -> Sequences:
        """These requests, in this order; nothing is copied."""
        chosen = np.asarray(index, dtype=np.int64)
        return Sequences(self.rows, self.starts[chosen], self.ends[chosen])

    def padded(self, index: Sequence[int] | npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: (b, longest, d_model) float32, zeros behind each end, and (b, longest), whether a row is there."""
        lengths = self.lengths[np.asarray(index)]
        rows = torch.zeros((len(lengths), int(lengths.max()), self.d_model))
        for place, i in enumerate(index):
            part = np.asarray(self.rows[self.starts[i] : self.ends[i]], dtype=np.float32)
            rows[place, : len(part)] = torch.from_numpy(part)
        return rows, torch.arange(rows.shape[1])[None] < torch.from_numpy(lengths)[:, None]
