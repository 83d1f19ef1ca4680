"""The texts that latents are described by: tokens in pieces, documents in two halves, and windows. Knows no SAE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError
from probes.fit.reading.rendered import Rendered

__all__ = ["Corpus", "CorpusError", "Windows", "cut_documents", "cut_windows", "whole_requests"]

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
        digest: SHA-256 of the texts.
    """

    pieces: tuple[Rendered, ...]
    document: Indices
    digest: str

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
        whole: (windows,) bool. The last window of a piece may be shorter: then fewer latents are active in it *and*
            fewer tokens stand in it, which would make any label look as if it foretold something.
    """

    of_row: Indices
    held_out: npt.NDArray[np.bool_]
    whole: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.held_out)


def cut_documents(documents: Iterable[Sequence[int]], *, piece_tokens: int, max_tokens: int, digest: str) -> Corpus:
    """Cut token ids into pieces, until there are enough.

    Args:
        documents: token ids of each text; no more of them are drawn than are needed.
        piece_tokens: of the longest piece.
        max_tokens: no document is begun once there are as many.
        digest: of the texts.
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
    return _enough(Corpus(tuple(pieces), np.array(origin, dtype=np.int64), digest))


def whole_requests(requests: Iterable[Rendered], *, max_tokens: int, digest: str) -> Corpus:
    """Requests as they are, each a document of its own, until there are enough.

    Args:
        requests: what is read of each begins at its ``first``.
        max_tokens: no request is taken once there are as many.
        digest: of the texts.
    Raises:
        CorpusError: fewer than four have eight tokens that are read.
    """
    pieces: list[Rendered] = []
    taken = 0
    for request in requests:
        if taken >= max_tokens:
            break
        if len(request.tokens) - request.first >= _LEAST_PIECE:
            pieces.append(request)
            taken += len(request.tokens) - request.first
    return _enough(Corpus(tuple(pieces), np.arange(len(pieces)), digest))


def _enough(corpus: Corpus) -> Corpus:
    documents = len(np.unique(corpus.document))
    if documents < _LEAST_DOCUMENTS:
        raise CorpusError(
            f"the corpus has {documents} texts of {_LEAST_PIECE} tokens or more; {_LEAST_DOCUMENTS} are the least, "
            "some thousands are usual: half of them make the labels, the others test them. Give more texts."
        )
    return corpus


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
    of_row = np.repeat(first[:-1], lengths) + within // width
    return Windows(of_row, np.repeat(held_out, counts), np.bincount(of_row, minlength=first[-1]) == width)
