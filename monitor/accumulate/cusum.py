"""A cumulative sum over requests that forgets as long as nothing happens (Page, 1954)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from monitor.accumulate.of_aggregate import OfAggregate
from probes.aggregate.base import Aggregator
from probes.aggregate.cusum import Cusum as CusumOfScores


class Cusum(OfAggregate):
    """``S_t = max(0, S_{t-1} + statistic_t - drift)``, from ``S_0 = 0``: many requests a little above ``drift``."""

    kind = "cusum"

    drift: Annotated[
        float, Field(allow_inf_nan=False, description="subtracted of each request: above what benign requests have")
    ] = 0.0

    @property
    def aggregate(self) -> Aggregator:
        """See ``OfAggregate``."""
        return CusumOfScores(drift=self.drift)
