"""Aggregates: how the scores of many tokens become one statistic. One file per aggregator, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from probes.aggregate.base import Aggregator
from probes.discovery import discover
from probes.errors import TelltaleError, did_you_mean

__all__ = ["AggregateError", "Aggregator", "AnyAggregator", "aggregator_kinds", "parse_aggregator"]


class AggregateError(TelltaleError, ValueError):
    """An aggregate's kind is not known."""


def aggregator_kinds() -> Mapping[str, type[Aggregator]]:
    """Every aggregator by its kind."""
    return discover(sys.modules[__name__], Aggregator)


def parse_aggregator(value: object) -> Aggregator:
    """Read ``{kind: rolling, window: 16}``.

    Raises:
        AggregateError: the kind is missing or unknown.
        pydantic.ValidationError: a parameter is unknown or out of range.
    """
    if isinstance(value, Aggregator):
        return value
    kinds = aggregator_kinds()
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise AggregateError(f"an aggregate is written {{kind: NAME, ...}}. Kinds: {sorted(kinds)}")
    kind = value["kind"]
    if kind not in kinds:
        raise AggregateError(f"aggregate kind {kind!r} is not known. {did_you_mean(kind, kinds)}")
    return kinds[kind].model_validate({key: item for key, item in value.items() if key != "kind"})


def _json_schema() -> dict[str, Any]:
    variants = []
    for kind, cls in aggregator_kinds().items():
        schema = cls.model_json_schema()
        schema["properties"] = {"kind": {"const": kind, "type": "string"}, **schema.get("properties", {})}
        schema["required"] = ["kind", *schema.get("required", [])]
        variants.append(schema)
    return {"oneOf": variants}


AnyAggregator = Annotated[
    Aggregator,
    PlainValidator(parse_aggregator),
    PlainSerializer(lambda value: value.config(), return_type=dict[str, Any]),
    WithJsonSchema(_json_schema()),
]
"""Any aggregator, as a pydantic field: validated by kind, serialised with its kind."""
