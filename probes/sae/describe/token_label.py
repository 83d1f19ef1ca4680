"""A label made of tokens: those that a latent is active on more often than chance, and how well they foretell it.

The label is made on one half of the documents. Its *detection score* is the balanced accuracy, on windows of the other
half, of saying that the latent is active in a window if one of the label's tokens stands in it. A model of this size
writes no labels worth reading; tokens are what can be said without one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array, csr_array

from probes.sae.describe.corpus import Windows

__all__ = ["DetectionScore", "LabelMaker", "TokenLabel", "TokenShare"]

_LEAST_SUPPORT = 3
"""Active rows of a token below which its PMI says nothing."""
_LEAST_PMI = 0.7
"""Nats: a label's token is twice as often active as any token."""
_MOST_TOKENS = 64
"""Of a label."""
_LEAST_WINDOWS = 10
"""Active ones, and ones that are not, that a score needs on each half."""

Indices = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenShare:
    """One token and a latent.

    Attributes:
        token: id.
        pmi: log of how much more often the latent is active on it than on any row, nats.
        active: rows of the token on which it is.
        rows: of the token.
    """

    token: int
    pmi: float
    active: int
    rows: int


@dataclass(frozen=True, slots=True)
class DetectionScore:
    """Of a label.

    Attributes:
        made_on: balanced accuracy on the windows that the label was made on.
        held_out: on the others.
        active_windows: held-out ones in which the latent is active.
    """

    made_on: float
    held_out: float
    active_windows: int


@dataclass(frozen=True, slots=True)
class TokenLabel:
    """What is said of one latent.

    Attributes:
        tokens: the label, the token that says most of the latent first; empty where nothing could be said.
        by_pmi: tokens with the highest PMI, for people to look at.
        score: None where the latent is active in too few or too many windows, or there is no label.
    """

    tokens: tuple[TokenShare, ...]
    by_pmi: tuple[TokenShare, ...]
    score: DetectionScore | None


class LabelMaker:
    """Makes and scores labels for any set of active rows of one corpus.

    Args:
        tokens: (rows,) ids.
        windows: which window each row stands in, and which of them are held out.
        shown: tokens by PMI that are kept for people.
    """

    def __init__(self, tokens: Indices, windows: Windows, *, shown: int = 12) -> None:
        self._windows = windows
        self._shown = shown
        self._vocabulary, self._token = np.unique(tokens, return_inverse=True)
        self._held_row = windows.held_out[windows.of_row]
        self._held_windows = windows.held_out & windows.whole
        self._own_windows = ~windows.held_out & windows.whole
        self._made_on = np.bincount(self._token[~self._held_row], minlength=len(self._vocabulary))
        self._num_made_on = int(self._made_on.sum())
        present = csr_array(
            (np.ones(len(tokens), dtype=np.bool_), (windows.of_row, self._token)),
            shape=(len(windows), len(self._vocabulary)),
        )
        self._present: csc_array = present.tocsc()

    def label(self, active: Indices) -> TokenLabel:
        """The label of a latent that is active on these rows, and its score.

        Of the tokens with a PMI above 0.7 those that tell most of the activity come first (active rows times PMI). Of
        their beginnings (1, 2, 3, 4, 6, 8, ... tokens) the one with the best balanced accuracy on its own half is
        the label.

        Args:
            active: row numbers.
        """
        candidates, by_pmi = self._candidates(active[~self._held_row[active]])
        truth = np.zeros(len(self._windows), dtype=np.bool_)
        truth[self._windows.of_row[active]] = True
        if not candidates or not self._can_be_scored(truth):
            return TokenLabel((), by_pmi, None)
        said = np.zeros(len(self._windows), dtype=np.bool_)
        best, size = 0.0, 0
        for count, share in enumerate(candidates, 1):
            said[self._windows_with(share.token)] = True
            if count in _SIZES or count == len(candidates):
                accuracy = _balanced_accuracy(said, truth, self._own_windows)
                if accuracy > best:
                    best, size = accuracy, count
        label = tuple(candidates[:size])
        return TokenLabel(label, by_pmi, DetectionScore(best, self.held_out_score(label, active), self._active(truth)))

    def held_out_score(self, label: tuple[TokenShare, ...], active: Indices) -> float:
        """Balanced accuracy of any label for a latent that is active on these rows, on held-out windows."""
        return self._score(label, active, self._held_windows)

    def made_on_score(self, label: tuple[TokenShare, ...], active: Indices) -> float:
        """The same on the other windows."""
        return self._score(label, active, self._own_windows)

    def shifted(self, active: Indices, generator: np.random.Generator) -> Indices:
        """The same activity at other rows: moved round each half by a random stretch.

        Density and runs stay as they are, the link with the tokens is cut.
        """
        parts = []
        for rows in (np.flatnonzero(~self._held_row), np.flatnonzero(self._held_row)):
            place = np.searchsorted(rows, active[np.isin(active, rows, assume_unique=True)])
            parts.append(rows[(place + generator.integers(1, max(len(rows), 2))) % max(len(rows), 1)])
        return np.sort(np.concatenate(parts))

    def _candidates(self, active: Indices) -> tuple[list[TokenShare], tuple[TokenShare, ...]]:
        counts = np.bincount(self._token[active], minlength=len(self._vocabulary))
        known = np.flatnonzero(counts >= _LEAST_SUPPORT)
        if not len(known):
            return [], ()
        pmi = np.log(counts[known] * self._num_made_on / (self._made_on[known] * len(active)))
        shares = [
            TokenShare(int(self._vocabulary[token]), float(value), int(counts[token]), int(self._made_on[token]))
            for token, value in zip(known, pmi, strict=True)
            if value > 0
        ]
        telling = [share for share in shares if share.pmi >= _LEAST_PMI]
        telling.sort(key=lambda share: (-share.active * share.pmi, share.token))
        shares.sort(key=lambda share: (-share.pmi, -share.active, share.token))
        return telling[:_MOST_TOKENS], tuple(shares[: self._shown])

    def _can_be_scored(self, truth: npt.NDArray[np.bool_]) -> bool:
        return all(
            min(int(truth[half].sum()), int((~truth[half]).sum())) >= _LEAST_WINDOWS
            for half in (self._held_windows, self._own_windows)
        )

    def _active(self, truth: npt.NDArray[np.bool_]) -> int:
        return int(truth[self._held_windows].sum())

    def _windows_with(self, token: int) -> npt.NDArray[np.int32]:
        column = int(np.searchsorted(self._vocabulary, token))
        found: npt.NDArray[np.int32] = self._present.indices[
            self._present.indptr[column] : self._present.indptr[column + 1]
        ]
        return found

    def _score(self, label: tuple[TokenShare, ...], active: Indices, half: npt.NDArray[np.bool_]) -> float:
        truth = np.zeros(len(self._windows), dtype=np.bool_)
        truth[self._windows.of_row[active]] = True
        said = np.zeros(len(self._windows), dtype=np.bool_)
        for share in label:
            said[self._windows_with(share.token)] = True
        return _balanced_accuracy(said, truth, half)


_SIZES = frozenset({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64})


def _balanced_accuracy(said: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], half: npt.NDArray[np.bool_]) -> float:
    said, truth = said[half], truth[half]
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)
