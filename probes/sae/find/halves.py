"""A labelled set in two halves: one to select on, one to measure on. No group stands in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError
from probes.fit.rows.example import Example

__all__ = ["FindError", "Halves", "split_halves"]

_LEAST = 8
"""Requests of each label in each half."""

Bools = npt.NDArray[np.bool_]


class FindError(TelltaleError, ValueError):
    """A labelled set does not allow to find latents."""


@dataclass(frozen=True, slots=True)
class Halves:
    """Which requests are measured on.

    Attributes:
        measured: (requests,) bool; the others are selected on.
        by_group: whether whole groups were dealt out. If not, requests of some group stand in both halves.
    """

    measured: Bools
    by_group: bool


def split_halves(rows: Sequence[Example], *, seed: int) -> Halves:
    """Deal groups out, those that hold label 1, label 0 and both apart; where there is but one, its requests.

    Args:
        rows: labels 0 and 1.
        seed: of the dealing.
    Raises:
        FindError: a half has fewer than 8 requests of a label.
    """
    generator = np.random.default_rng(seed)
    labels = np.array([row.label for row in rows], dtype=np.int64)
    held: dict[str, set[int]] = {}
    for row in rows:
        held.setdefault(row.group, set()).add(row.label)
    group_of = np.array([row.group for row in rows], dtype=object)
    measured = np.zeros(len(rows), dtype=np.bool_)
    by_group = True
    for kind in ({1}, {0}, {0, 1}):
        groups = sorted(group for group, found in held.items() if found == kind)
        if len(groups) == 1:
            by_group = False
            inside = np.flatnonzero(group_of == groups[0])
            measured[generator.permutation(inside)[: len(inside) // 2]] = True
        elif groups:
            chosen = generator.permutation(np.array(groups, dtype=object))[: len(groups) // 2]
            measured[np.isin(group_of.astype(str), chosen.astype(str))] = True
    counts = [int((labels[half] == label).sum()) for half in (measured, ~measured) for label in (1, 0)]
    if min(counts) < _LEAST:
        raise FindError(
            f"half of the set is selected on and half measured on; a half has {min(counts)} requests of a label, "
            f"{_LEAST} are the least (positives and negatives measured on: {counts[0]}, {counts[1]}; selected on: "
            f"{counts[2]}, {counts[3]}). Give more rows, in more groups."
        )
    return Halves(measured, by_group)
