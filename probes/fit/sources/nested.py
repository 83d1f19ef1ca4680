"""Sets inside a set: what a source is made of that passes on the rows of others."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from probes.fit.sources.base import Source, SourceError

__all__ = ["Sets"]


def _parse(value: object) -> tuple[Source, ...]:
    # The package looks at this module while it is imported: its list of kinds is not there before.
    from probes.fit.sources import parse_source

    if not isinstance(value, (list, tuple)) or not value:
        raise SourceError(f"'of' is {value!r}; it lists the sets that are meant, such as [{{kind: adv_bench}}].")
    return tuple(parse_source(item) for item in value)


def _config(sets: tuple[Source, ...]) -> list[dict[str, Any]]:
    return [each.config() for each in sets]


Sets = Annotated[
    tuple[Source, ...],
    PlainValidator(_parse),
    PlainSerializer(_config, return_type=list[dict[str, Any]]),
    WithJsonSchema(
        {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["kind"]}, "description": "the sets"}
    ),
]
"""Sources of any kind, one at least, as a pydantic field."""
