"""Steering: how a direction is written to the model. One file per operator, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from probes.discovery import discover
from probes.errors import did_you_mean
from probes.steering.base import Latent, Operator, Sign, SteerError, Update, Vector

__all__ = ["Latent", "Operator", "Sign", "SteerError", "Update", "Vector", "operator_kinds", "parse_operator"]


def operator_kinds() -> Mapping[str, type[Operator]]:
    """Every operator by its kind."""
    return discover(sys.modules[__name__], Operator)


def parse_operator(kind: str, parameters: Mapping[str, object]) -> Operator:
    """An operator with its parameters, as they stand in a policy file.

    Raises:
        SteerError: the kind is not known.
        pydantic.ValidationError: a parameter is unknown or out of range.
    """
    kinds = operator_kinds()
    if kind not in kinds:
        raise SteerError(f"the steering operator {kind!r} is not known. {did_you_mean(kind, kinds)}")
    return kinds[kind].model_validate(dict(parameters))
