"""Histograms of statistics, each with buckets of its own: fitted to its calibration and cut at its thresholds.

The client library gives all series of a histogram the same buckets. Here each series is a histogram by itself, and
all are collected under one name; with several processes, where the library reads files, they are one name anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from monitor import catalogue
from monitor.policy import Plan

Labels = tuple[str, str, str, str]
_LEVELS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
_BEYOND = (0.5, 1.0, 2.0)
_DIGITS = 6


class ScoreHistograms(Collector):
    """The histograms of statistics; each is there once the first request was judged by its check.

    A series keeps the buckets with which it began, also under a policy that is loaded later.
    """

    def __init__(self) -> None:
        self._series: dict[Labels, Histogram] = {}

    def observe(self, plan: Plan, key: Labels, statistic: float) -> None:
        """One more request.

        Args:
            plan: that it was judged by.
            key: labels of the check.
            statistic: finite.
        """
        if key not in self._series:
            self._series[key] = _histogram(plan, key)
        self._series[key].observe(statistic)

    def describe(self) -> Iterable[Metric]:
        """The name alone."""
        metric = catalogue.DETECTOR_SCORE
        return [Metric(metric.name, metric.help, metric.type.value)]

    def collect(self) -> Iterable[Metric]:
        """All series under one name."""
        (family,) = self.describe()
        for key, series in list(self._series.items()):
            own = dict(zip(catalogue.DETECTOR_SCORE.labels, key, strict=True))
            for found in series.collect():
                for sample in found.samples:
                    family.add_sample(sample.name, own | sample.labels, sample.value)
        return [family]


def labels_of(plan: Plan) -> tuple[Labels, ...]:
    """Of each check what tells its statistic from others: two checks with two thresholds may be of one statistic."""
    return tuple(
        (check.detector, check.stage.value, check.statistic, ",".join(check.segments or ())) for check in plan.checks
    )


def _histogram(plan: Plan, key: Labels) -> Histogram:
    metric = catalogue.DETECTOR_SCORE
    positions = [position for position, labels in enumerate(labels_of(plan)) if labels == key]
    buckets = {bound for position in positions for bound in _bounds(plan, position)}
    return Histogram(metric.name, metric.help, metric.labels, buckets=sorted(buckets), registry=None).labels(*key)


def _bounds(plan: Plan, position: int) -> Iterable[float]:
    """Where the buckets of a check are cut: a threshold is always a bound, so that what lies above can be read off."""
    check = plan.checks[position]
    limits = [*check.thresholds.values(), *(value for lengths in check.by_length.values() for value in lengths.values)]
    fitted = [bound for calibration in plan.calibrations(position) for bound in _fitted(calibration.quantiles)]
    return [float(f"{bound:.{_DIGITS}g}") for bound in fitted or catalogue.SCORE_BUCKETS] + limits


def _fitted(quantiles: Sequence[float]) -> list[float]:
    """Bounds from quantiles; beyond both ends as far as the ends lie from the middle, and twice that far."""
    if not quantiles:
        return []
    last = len(quantiles) - 1
    bounds = [quantiles[round(level * last)] for level in _LEVELS]
    least, middle, largest = quantiles[0], quantiles[last // 2], quantiles[-1]
    return [
        *(least - (middle - least) * factor for factor in _BEYOND),
        *bounds,
        *(largest + (largest - middle) * factor for factor in _BEYOND),
    ]
