"""Token fitters: probes that are fitted on whole sequences. One file per fitter, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from probes.discovery import discover
from probes.fit.token_fitters.base import TokenFitter, TokenModule, TokenProbe

__all__ = ["TokenFitter", "TokenModule", "TokenProbe", "token_fitter_kinds"]


def token_fitter_kinds() -> Mapping[str, type[TokenFitter]]:
    """Every token fitter by its kind."""
    return discover(sys.modules[__name__], TokenFitter)
