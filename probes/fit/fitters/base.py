"""What a fitter is: labelled features in, a linear probe out. Knows no text, no model and no layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from probes.fit.training.linear_probe import Floats, Labels, LinearProbe


class Fitter(BaseModel, ABC):
    """A way to find a direction. One file per fitter, found by its ``kind``.

    The fields of a subclass are its parameters; they stand in recipes. Both classes weigh alike, whatever their counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: ClassVar[str]

    @abstractmethod
    def fit(self, features: Floats, labels: Labels) -> LinearProbe:
        """Fit.

        Args:
            features: (n, d_model), finite.
            labels: (n,), 0 or 1, both present.
        """

    def config(self) -> dict[str, Any]:
        """The parameters as they stand in a recipe."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    def __str__(self) -> str:
        parameters = ",".join(f"{key}={value}" for key, value in self.model_dump(mode="json").items())
        return f"{self.kind}({parameters})" if parameters else self.kind
