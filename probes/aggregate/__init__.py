"""Aggregates: how the scores of many tokens become one statistic. One file per aggregator, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from probes.aggregate.base import Aggregator
from probes.discovery import discover
from probes.errors import TelltaleError
from probes.kinded import kinded_schema, parse_kinded

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
    return parse_kinded(value, Aggregator, aggregator_kinds(), what="an aggregate", error=AggregateError)


AnyAggregator = Annotated[
    Aggregator,
    PlainValidator(parse_aggregator),
    PlainSerializer(lambda value: value.config(), return_type=dict[str, Any]),
    WithJsonSchema(kinded_schema(aggregator_kinds())),
]
"""Any aggregator, as a pydantic field: validated by kind, serialised with its kind."""
