"""Parts of a set that are measured apart: by source, role, language and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from probes.fit.rows.example import Example

__all__ = ["Slice", "SliceKey", "length_bucket", "slices"]

_SHORTEST = 16
UNKNOWN = "not given"


class SliceKey(StrEnum):
    """By what a set is cut."""

    SOURCE = "source"
    """The set that a row came from."""
    ROLE = "role"
    """Who wrote what is judged: the newest message's role, or the assistant for a reply."""
    LANGUAGE = "language"
    """As given with the row; nothing is guessed."""
    LENGTH = "length"
    """Tokens that are read, in buckets that double."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows with one value of one key, by index."""

    key: SliceKey
    value: str
    rows: npt.NDArray[np.int64]


def slices(examples: Sequence[Example], lengths: Sequence[int]) -> Iterator[Slice]:
    """Every value of every key that has more than one; lengths from short to long, the others by name.

    Args:
        examples: of the set.
        lengths: tokens of each that are read.
    """
    values: tuple[tuple[SliceKey, Callable[[int], str]], ...] = (
        (SliceKey.SOURCE, lambda row: examples[row].source),
        (SliceKey.ROLE, lambda row: _role(examples[row])),
        (SliceKey.LANGUAGE, lambda row: examples[row].language or UNKNOWN),
        (SliceKey.LENGTH, lambda row: length_bucket(lengths[row])),
    )
    for key, value_of in values:
        members: dict[str, list[int]] = {}
        order = np.argsort(lengths, kind="stable") if key is SliceKey.LENGTH else range(len(examples))
        for row in order:
            members.setdefault(value_of(int(row)), []).append(int(row))
        if len(members) > 1:
            names = list(members) if key is SliceKey.LENGTH else sorted(members)
            yield from (Slice(key, name, np.sort(np.array(members[name], dtype=np.int64))) for name in names)


def length_bucket(length: int) -> str:
    """``1-16``, ``17-32``, ``33-64`` and so on, in tokens."""
    low, high = 1, _SHORTEST
    while length > high:
        low, high = high + 1, 2 * high
    return f"{low}-{high}"


def _role(example: Example) -> str:
    if example.response:
        return "assistant"
    return example.turns[-1][0] if example.turns else "user"
