"""Sources of examples: one file per kind, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from probes.discovery import discover
from probes.errors import did_you_mean
from probes.fit.sources.base import Source, SourceContext, SourceError

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
    if isinstance(value, Source):
        return value
    kinds = source_kinds()
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise SourceError(f"a source is written {{kind: NAME, ...}}. Kinds: {', '.join(kinds)}.")
    kind = str(value["kind"])
    if kind not in kinds:
        raise SourceError(f"source kind '{kind}' is not known. {did_you_mean(kind, kinds)}")
    return kinds[kind].model_validate({key: item for key, item in value.items() if key != "kind"})


def _json_schema() -> dict[str, Any]:
    variants = []
    for kind, cls in source_kinds().items():
        schema = cls.model_json_schema()
        schema["properties"] = {"kind": {"const": kind, "type": "string"}, **schema.get("properties", {})}
        schema["required"] = ["kind", *schema.get("required", [])]
        variants.append(schema)
    return {"oneOf": variants}


def _config(source: Source) -> dict[str, Any]:
    return source.config()


AnySource = Annotated[
    Source,
    PlainValidator(parse_source),
    PlainSerializer(_config, return_type=dict[str, Any]),
    WithJsonSchema(_json_schema()),
]
"""Any source, as a pydantic field."""
