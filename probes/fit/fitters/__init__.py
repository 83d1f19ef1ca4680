"""Fitters: how a direction is found. One file per fitter, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from probes.discovery import discover
from probes.errors import TelltaleError
from probes.fit.fitters.base import Fitter
from probes.kinded import kinded_schema, parse_kinded

__all__ = ["AnyFitter", "Fitter", "FitterError", "fitter_kinds", "parse_fitter"]


class FitterError(TelltaleError, ValueError):
    """A fitter's kind is not known."""


def fitter_kinds() -> Mapping[str, type[Fitter]]:
    """Every fitter by its kind."""
    return discover(sys.modules[__name__], Fitter)


def parse_fitter(value: object) -> Fitter:
    """Read ``{kind: logistic, inverse_penalty: 0.01}``.

    Raises:
        FitterError: the kind is missing or unknown.
        pydantic.ValidationError: a parameter is unknown or out of range.
    """
    return parse_kinded(value, Fitter, fitter_kinds(), what="a fitter", error=FitterError)


def _config(fitter: Fitter) -> dict[str, Any]:
    return fitter.config()


AnyFitter = Annotated[
    Fitter,
    PlainValidator(parse_fitter),
    PlainSerializer(_config, return_type=dict[str, Any]),
    WithJsonSchema(kinded_schema(fitter_kinds())),
]
"""Any fitter, as a pydantic field."""
