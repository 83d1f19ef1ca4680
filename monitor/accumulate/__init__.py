"""Accumulators: how the requests of a session become one number. One file per accumulator, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from monitor.accumulate.base import Accumulator, State, Step
from probes.discovery import discover
from probes.errors import TelltaleError
from probes.kinded import kinded_schema, parse_kinded

__all__ = ["AccumulateError", "Accumulator", "AnyAccumulator", "State", "Step", "accumulator_kinds"]


class AccumulateError(TelltaleError, ValueError):
    """An accumulator's kind is not known."""


def accumulator_kinds() -> Mapping[str, type[Accumulator]]:
    """Every accumulator by its kind."""
    return discover(sys.modules[__name__], Accumulator)


def parse_accumulator(value: object) -> Accumulator:
    """Read ``{kind: cusum, drift: 1.0}``.

    Raises:
        AccumulateError: the kind is missing or unknown.
        pydantic.ValidationError: a parameter is unknown or out of range.
    """
    return parse_kinded(value, Accumulator, accumulator_kinds(), what="an accumulator", error=AccumulateError)


AnyAccumulator = Annotated[
    Accumulator,
    PlainValidator(parse_accumulator),
    PlainSerializer(lambda value: value.config(), return_type=dict[str, Any]),
    WithJsonSchema(kinded_schema(accumulator_kinds())),
]
"""Any accumulator, as a pydantic field: validated by kind, serialised with its kind."""
