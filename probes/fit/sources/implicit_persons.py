"""Our own texts that single out a private person without a name or a number, each beside a twin that does not."""

from __future__ import annotations

from probes.fit.generated.implicit_persons import IMPLICIT
from probes.fit.rows.example import Example
from probes.fit.sources.base import Source, SourceContext


class ImplicitPersons(Source):
    """24 pairs; a pair is a group."""

    kind = "implicit_persons"

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        return [
            Example(text=text, label=label, source=self.kind, group=f"{self.kind}/{number}")
            for number, (personal, general) in enumerate(IMPLICIT)
            for text, label in ((personal, 1), (general, 0))
        ]
