"""Linear discriminant analysis with a shrunk covariance."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from probes.fit.fitters.base import Fitter
from probes.fit.training.linear_probe import Floats, Labels, LinearProbe, standard_units


class Lda(Fitter):
    """The difference of means, seen through the inverse of the classes' common covariance; scores are logits.

    The covariance is drawn towards a multiple of the identity: with as many dimensions as rows its own inverse is
    noise. Without ``shrinkage`` the amount is that of Ledoit and Wolf (2004).
    """

    kind = "lda"

    shrinkage: Annotated[
        float | None, Field(gt=0, le=1, description="1: the identity alone; left out: by Ledoit and Wolf")
    ] = None

    def fit(self, features: Floats, labels: Labels) -> LinearProbe:
        """See ``Fitter.fit``."""
        mean, scale = standard_units(features)
        model = LinearDiscriminantAnalysis(
            solver="lsqr", shrinkage="auto" if self.shrinkage is None else self.shrinkage, priors=[0.5, 0.5]
        )
        model.fit((features.astype(np.float64) - mean) / scale, labels)
        return LinearProbe(model.coef_[0].astype(np.float32), mean, scale, float(model.intercept_[0]))
