"""What an aggregate is: a streaming state over the scores of a read sequence. Knows no detector and no request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Scores = npt.NDArray[np.float64]


class Aggregator(BaseModel, ABC):
    """A running statistic, vectorised over requests (R) and detectors (B).

    One file per aggregator. The fields of a subclass are its parameters; they appear in the policy file's schema.
    ``update`` must give the same numbers for any way of cutting the sequence into chunks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]
    one_score_decides: ClassVar[bool] = False
    """Whether the statistic lies above a limit exactly if one score so far does."""

    reads_before: ClassVar[bool] = False
    """Whether the row before the first one that a rule reads is wanted too, as the first value."""

    @property
    def channels(self) -> int:
        """C, the numbers of a row that one running statistic takes: 1 unless the aggregate goes with one kind."""
        return 1

    @property
    @abstractmethod
    def state_size(self) -> int:
        """S, the number of float64 values that one running statistic needs."""

    @property
    def initial(self) -> float:
        """What every value of a fresh state holds."""
        return 0.0

    @abstractmethod
    def update(self, state: Scores, values: Scores) -> Scores:
        """Feed T scores of each of R requests.

        Args:
            state: (R, S, B) float64, changed in place.
            values: (T, R, B * C) float64, finite, oldest first; the channels of a detector stand side by side.
        Returns: (T, R, B), the statistic after each score; ``-inf`` where it is not yet defined (never fires).
        """

    def new_state(self, num_requests: int, num_detectors: int) -> Scores:
        """Fresh state for ``num_requests`` sequences: (R, S, B)."""
        return np.full((num_requests, self.state_size, num_detectors), self.initial, dtype=np.float64)

    def config(self) -> dict[str, Any]:
        """The parameters as they stand in a policy file or on a card."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    def __str__(self) -> str:
        parameters = ",".join(f"{key}={value}" for key, value in self.model_dump(mode="json").items())
        return f"{self.kind}({parameters})" if parameters else self.kind
