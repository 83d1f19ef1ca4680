"""How the fits of detectors are repeated: on other rows, permuted labels, another model. One file per kind."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from probes.artifact import Artifact
from probes.discovery import discover
from probes.fit.refits.base import KindFit, RefitError, fitter_config
from probes.fit.refits.fitted_by_tokens import FittedByTokens

__all__ = ["KindFit", "RefitError", "fitter_config", "kind_fit", "refit_kinds"]


def refit_kinds() -> Mapping[str, type[KindFit]]:
    """The kinds whose fit is repeated by a file of their own."""
    return discover(sys.modules[__name__], KindFit)


def kind_fit(artifact: Artifact) -> KindFit:
    """How the fit of a detector is repeated: by its kind's own file, else by the token fitter that its card names.

    Raises:
        RefitError: neither is there, or the card does not say enough.
    """
    if len(artifact.taps) != 1:
        raise RefitError(f"it reads {len(artifact.taps)} taps, and fits of single ones are repeated")
    own = refit_kinds().get(artifact.card.kind)
    return own.of(artifact) if own is not None else FittedByTokens.of(artifact)
