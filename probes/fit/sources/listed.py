"""Rows of other sets that a list of digests names: rows that were fixed before anything was measured on them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from probes.fit.rows.example import Example, without_duplicates
from probes.fit.sources.base import Source, SourceContext, SourceError
from probes.fit.sources.nested import Sets

_LONGEST_HINT = 3


class Listed(Source):
    """Exactly the rows that the list names, in the order in which the sets give them.

    A digest is that of ``Example.digest``: of the text in lower case, everything but letters and digits as one space.
    """

    kind = "listed"

    of: Sets
    digests: Annotated[
        str, Field(min_length=1, description="file with a SHA-256 a line, '#' before remarks; relative to the recipe")
    ]

    def load(self, context: SourceContext) -> list[Example]:
        """See ``Source.load``."""
        path = context.folder / self.digests
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{path}: cannot be read ({error}). Name a file with one SHA-256 a line.") from error
        wanted = {line for line in lines if line and not line.startswith("#")}
        found = without_duplicates((example for each in self.of for example in each.load(context)), seen=set())
        kept = [example for example in found if example.digest in wanted]
        if missing := sorted(wanted - {example.digest for example in kept}):
            raise SourceError(
                f"{path}: {len(missing)} of {len(wanted)} rows are in none of the sets "
                f"({', '.join(digest[:12] for digest in missing[:_LONGEST_HINT])} ...). The list holds for one seed "
                "and one version of the sets: use those, or make a list of your own."
            )
        return kept
