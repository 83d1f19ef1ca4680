"""The texts that latents are described by: tokens in pieces, documents in two halves, and windows. Knows no SAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError
from probes.fit.reading.rendered import Rendered

__all__ = ["Corpus", "CorpusError", "Windows", "cut_documents", "cut_windows"]

_LEAST_PIECE = 8
"""Shorter pieces say little, and most of them is the sink."""
_LEAST_DOCUMENTS = 4

Indices = npt.NDArray[np.int64]


class CorpusError(TelltaleError, ValueError):
    """A corpus does not suffice to describe latents by."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, cut into pieces that the model reads one by one.

    Attributes:
        pieces: what the model reads.
        document: (pieces,) int64, the document of each piece.
    """

    pieces: tuple[Rendered, ...]
    document: Indices

    @property
    def num_tokens(self) -> int:
        """Of all pieces, sinks included."""
        return sum(len(piece.tokens) for piece in self.pieces)

    def halves(self, seed: int) -> npt.NDArray[np.bool_]:
        """(pieces,) whether a piece is held out: half of the documents are, and never half a document."""
        documents = np.unique(self.document)
        held = np.random.default_rng(seed).permutation(documents)[: len(documents) // 2]
        return np.isin(self.document, held)


@dataclass(frozen=True, slots=True)
class Windows:
    """Neighbouring rows of one piece, each a context that a latent is active in or not.

    Attributes:
        of_row: (rows,) int64, the window of each row.
        held_out: (windows,) bool.
    """

    of_row: Indices
    held_out: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.held_out)


def cut_documents(documents: Sequence[Sequence[int]], *, piece_tokens: int, max_tokens: int) -> Corpus:
    """Cut token ids into pieces, until there are enough.

    Args:
        documents: token ids of each text.
        piece_tokens: of the longest piece.
        max_tokens: no document is begun once there are as many.
    Raises:
        CorpusError: fewer than four documents have a piece of eight tokens.
    """
    pieces: list[Rendered] = []
    origin: list[int] = []
    taken = 0
    for number, tokens in enumerate(documents):
        if taken >= max_tokens:
            break
        for start in range(0, len(tokens), piece_tokens):
            piece = tuple(tokens[start : start + piece_tokens])
            if len(piece) >= _LEAST_PIECE:
                pieces.append(Rendered(piece, 0))
                origin.append(number)
                taken += len(piece)
    if len(set(origin)) < _LEAST_DOCUMENTS:
        raise CorpusError(
            f"the corpus has {len(set(origin))} texts of {_LEAST_PIECE} tokens or more; {_LEAST_DOCUMENTS} are the "
            "least, some thousands are usual: half of them make the labels, the others test them. Give more texts."
        )
    return Corpus(tuple(pieces), np.array(origin, dtype=np.int64))


def cut_windows(offsets: Indices, held_out: npt.NDArray[np.bool_], *, width: int) -> Windows:
    """Cut the rows of each piece into windows; the last of a piece may be shorter.

    Args:
        offsets: (pieces + 1,) first row of each piece, and the number of rows.
        held_out: (pieces,).
        width: rows of a window.
    """
    lengths = np.diff(offsets)
    counts = -(-lengths // width)
    first = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return Windows(np.repeat(first[:-1], lengths) + within // width, np.repeat(held_out, counts))
