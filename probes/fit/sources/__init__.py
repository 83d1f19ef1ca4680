"""Sources of examples: one file per kind, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from probes.discovery import discover
from probes.fit.sources.base import Source, SourceContext, SourceError
from probes.kinded import kinded_schema, parse_kinded

__all__ = ["AnySource", "Source", "SourceContext", "SourceError", "parse_source", "source_kinds"]


def source_kinds() -> Mapping[str, type[Source]]:
    """Every source by its kind."""
    return discover(sys.modules[__name__], Source)


def parse_source(value: object) -> Source:
    """Read ``{kind: jsonl, path: mine.jsonl}``.

    Raises:
        SourceError: the kind is missing or unknown.
        pydantic.ValidationError: a parameter is unknown or out of range.
    """
    return parse_kinded(value, Source, source_kinds(), what="a source", error=SourceError)


def _config(source: Source) -> dict[str, Any]:
    return source.config()


AnySource = Annotated[
    Source,
    PlainValidator(parse_source),
    PlainSerializer(_config, return_type=dict[str, Any]),
    WithJsonSchema(kinded_schema(source_kinds())),
]
"""Any source, as a pydantic field."""
