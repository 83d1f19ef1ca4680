"""Rows of other sets as harmless ones, whatever their label there: personal data is no request for harm."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example
from probes.fit.sources.base import Source, SourceContext
from probes.fit.sources.nested import Sets


class Part(StrEnum):
    """Which groups are taken."""

    ALL = "all"
    TRAINING = "training"
    """About half of them."""
    CHECKING = "checking"
    """The other half."""


class Harmless(Source):
    """The rows of other sets with the label 0.

    A group is on the same side of ``training`` and ``checking`` whatever the recipe's seed: detectors that are trained
    on the one half can all be measured on the other.
    """

    kind = "harmless"

    of: Sets
    labels: Annotated[
        tuple[int, ...], Field(strict=False, min_length=1, description="that are taken, as these sets give them")
    ] = (0, 1)
    part: Annotated[Part, Field(strict=False, description="which groups are taken")] = Part.ALL

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        return [
            replace(example, label=0)
            for each in self.of
            for example in each.load(context)
            if example.label in self.labels and self._takes(example.group)
        ]

    def _takes(self, group: str) -> bool:
        even = hashlib.sha256(f"part/{group}".encode()).digest()[0] % 2 == 0
        return self.part is Part.ALL or even == (self.part is Part.TRAINING)
