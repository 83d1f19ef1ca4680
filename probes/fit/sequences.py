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
    """Requests of different lengths, one behind the other.

    Attributes:
        rows: (tokens of all requests, d_model), activations; may be a memory map.
        starts: (n + 1,) int64, the first row of each request, and the number of rows.
    """

    rows: npt.NDArray[np.floating]
    starts: npt.NDArray[np.int64]

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
        return cls(np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[npt.NDArray[np.floating]]:
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            yield self.rows[start:end]

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return int(self.rows.shape[1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) rows of each request."""
        return np.diff(self.starts)

    def some(self, index: Sequence[int] | npt.NDArray[np.int64]) -> Sequences:
        """These requests, in this order."""
        return Sequences.of(self.rows[self.starts[i] : self.starts[i + 1]] for i in index)

    def padded(self, index: Sequence[int] | npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: (b, longest, d_model) float32, zeros behind each end, and (b, longest), whether a row is there."""
        lengths = self.lengths[np.asarray(index)]
        rows = torch.zeros((len(lengths), int(lengths.max()), self.d_model))
        for place, i in enumerate(index):
            part = np.asarray(self.rows[self.starts[i] : self.starts[i + 1]], dtype=np.float32)
            rows[place, : len(part)] = torch.from_numpy(part)
        return rows, torch.arange(rows.shape[1])[None] < torch.from_numpy(lengths)[:, None]
