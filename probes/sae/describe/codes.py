"""The latents' activities on requests, kept sparse: what everything about latents is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array, csr_array, vstack

from probes.errors import TelltaleError
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import ActivationSource
from probes.taps import Tap

__all__ = ["SINK_FACTOR", "Codes", "CodesError", "Encoder", "read_codes"]

SINK_FACTOR = 10.0
"""Times the median norm: rows beyond are sinks, wherever they stand, and say nothing of what a latent stands for."""

_MOST_ENTRIES = 150_000_000
"""Active latents that are kept, over all tokens: 8 bytes each, 1.2 GB."""

Float32 = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class CodesError(TelltaleError, ValueError):
    """Codes cannot be read, or are too many."""


class Encoder(Protocol):
    """What gives latents: a SAE, or random directions in its place."""

    @property
    def tap(self) -> Tap:
        """Where it reads."""
        ...

    @property
    def width(self) -> int:
        """Number of latents."""
        ...

    def encode(self, rows: Float32) -> Float32:
        """(n, width) activities of (n, d_model) rows; 0 where a latent is not active."""
        ...


@dataclass(frozen=True, slots=True)
class Codes:
    """Activities of all latents on the read tokens of some requests.

    Attributes:
        matrix: (rows, width) float32, sparse by rows; a row is a token that is read.
        tokens: (rows,) int64, its id.
        offsets: (requests + 1,) int64, the first row of each request, and the number of rows.
    """

    matrix: csr_array
    tokens: Indices
    offsets: Indices

    @property
    def width(self) -> int:
        """Number of latents."""
        return int(self.matrix.shape[1])

    @property
    def num_rows(self) -> int:
        """Tokens that were read."""
        return len(self.tokens)

    @property
    def num_requests(self) -> int:
        """Requests, also those without a row."""
        return len(self.offsets) - 1

    def by_latent(self) -> csc_array:
        """The same, sparse by latents; row numbers of each ascend."""
        turned = self.matrix.tocsc()
        turned.sort_indices()
        return turned

    def density(self) -> npt.NDArray[np.float64]:
        """(width,) share of rows on which each latent is active."""
        counts = np.bincount(self.matrix.indices, minlength=self.width)
        return counts / max(self.num_rows, 1)

    def request_of_row(self) -> Indices:
        """(rows,) the request of each row."""
        return np.repeat(np.arange(self.num_requests), np.diff(self.offsets))

    def means(self) -> Float32:
        """(requests, width) mean activity over a request's rows, 0 for a request without rows."""
        lengths = np.diff(self.offsets)
        weights = np.repeat(1.0 / np.maximum(lengths, 1), lengths).astype(np.float32)
        gather = csr_array((weights, np.arange(self.num_rows), self.offsets), shape=(self.num_requests, self.num_rows))
        return np.asarray((gather @ self.matrix).todense(), dtype=np.float32)

    def maxima(self) -> Float32:
        """(requests, width) largest activity over a request's rows, 0 for a request without rows."""
        found = np.zeros((self.num_requests, self.width), dtype=np.float32)
        rows = np.repeat(self.request_of_row(), np.diff(self.matrix.indptr))
        np.maximum.at(found, (rows, self.matrix.indices), self.matrix.data)
        return found


def read_codes(
    encoders: Sequence[Encoder],
    source: ActivationSource,
    requests: Sequence[Rendered],
    *,
    skip_first: int,
    label: str,
    max_norm: float = np.inf,
) -> list[Codes]:
    """Encode every read token of every request, in one pass; activations are let go as soon as they are encoded.

    Args:
        encoders: whose latents are wanted; each at its own tap.
        source: of the activations.
        requests: what to read.
        skip_first: leading positions with a sink's norm; they are no rows.
        label: what the requests are, for progress.
        max_norm: rows with a greater norm are rows, but nothing counts as active on them. A served detector reads
            them like any other: what is to be told of one is read without this.
    Returns: for each encoder, its codes; the requests stand in their order.

    Raises:
        CodesError: a code is not finite, or so many latents are active that they are no sparse code.
    """
    taps = sorted({encoder.tap for encoder in encoders})
    parts: list[list[csr_array | None]] = [[None] * len(requests) for _ in encoders]
    entries = 0
    for number, found in source.sweep(requests, taps, label=label):
        positions = requests[number].positions(skip_first)
        for encoder, place in zip(encoders, parts, strict=True):
            rows = np.ascontiguousarray(found[encoder.tap][positions], dtype=np.float32)
            dense = encoder.encode(rows)
            dense[np.linalg.norm(rows, axis=1) > max_norm] = 0.0
            codes = csr_array(dense)
            if not np.isfinite(codes.data).all():
                raise CodesError(
                    f"{label}: codes of request {number} are NaN or infinite. The SAE's tensors or the model's "
                    "activations are damaged: load both again."
                )
            entries += codes.nnz
            place[number] = codes
        if entries > _MOST_ENTRIES:
            raise CodesError(
                f"{label}: more than {_MOST_ENTRIES} latents are active on the first {number + 1} requests. Give fewer "
                "tokens; if each token has hundreds of active latents, the SAE's threshold is wrong."
            )
    read = [request.positions(skip_first) for request in requests]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in read])]).astype(np.int64)
    tokens = np.concatenate(
        [np.asarray(request.tokens, dtype=np.int64)[each] for request, each in zip(requests, read, strict=True)]
        or [np.empty(0, dtype=np.int64)]
    )
    made = []
    for place in parts:
        complete = [codes for codes in place if codes is not None]
        if not complete or len(complete) != len(requests):
            raise CodesError(f"{label}: {len(complete)} of {len(requests)} requests were read. Give some, and all.")
        made.append(Codes(csr_array(vstack(complete, format="csr")), tokens, offsets))
    return made
