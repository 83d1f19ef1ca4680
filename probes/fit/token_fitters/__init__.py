"""Token fitters: probes that are fitted on whole sequences. One file per fitter, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from probes.discovery import discover
from probes.fit.fitters import FitterError
from probes.fit.token_fitters.base import TokenFitter, TokenModule, TokenProbe
from probes.kinded import kinded_schema, parse_kinded

__all__ = ["AnyTokenFitter", "TokenFitter", "TokenModule", "TokenProbe", "parse_token_fitter", "token_fitter_kinds"]


def token_fitter_kinds() -> Mapping[str, type[TokenFitter]]:
    """Every token fitter by its kind."""
    return discover(sys.modules[__name__], TokenFitter)


def parse_token_fitter(value: object) -> TokenFitter:
    """Read ``{kind: attention, heads: 4}``.

    Raises:
        FitterError: the kind is missing or unknown.
        pydantic.ValidationError: a parameter is unknown or out of range.
    """
    return parse_kinded(value, TokenFitter, token_fitter_kinds(), what="a token fitter", error=FitterError)


def _config(fitter: TokenFitter) -> dict[str, Any]:
    return fitter.config()


AnyTokenFitter = Annotated[
    TokenFitter,
    PlainValidator(parse_token_fitter),
    PlainSerializer(_config, return_type=dict[str, Any]),
    WithJsonSchema(kinded_schema(token_fitter_kinds())),
]
"""Any token fitter, as a pydantic field."""
