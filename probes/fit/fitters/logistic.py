"""Logistic regression on standardised features."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from sklearn.linear_model import LogisticRegression

from probes.fit.fitters.base import Fitter
from probes.fit.training.linear_probe import Floats, Labels, LinearProbe, standard_units

_MAX_ITERATIONS = 2000


class Logistic(Fitter):
    """Logistic regression with L2 penalty; scores are logits."""

    kind = "logistic"

    inverse_penalty: Annotated[float, Field(gt=0, description="C: small is a strong penalty")]

    def fit(self, features: Floats, labels: Labels) -> LinearProbe:
        """See ``Fitter.fit``."""
        mean, scale = standard_units(features)
        standardised = (features.astype(np.float64) - mean) / scale
        model = LogisticRegression(C=self.inverse_penalty, class_weight="balanced", max_iter=_MAX_ITERATIONS)
        model.fit(standardised, labels)
        return LinearProbe(model.coef_[0].astype(np.float32), mean, scale, float(model.intercept_[0]))
