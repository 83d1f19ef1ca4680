"""The report on a detector as data: every figure with its n, interval, controls and where it comes from.

It holds no text of any row, so it may be stored and shown where the rows may not.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from probes.aggregate import AnyAggregator
from probes.card import Digest, Format, Stage
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.delay import Delay
from probes.fit.evaluation.measure import Estimate, Quality, RateAt
from probes.fit.evaluation.verdict import Verdict
from probes.fit.rows.slices import SliceKey

__all__ = [
    "Absent",
    "Band",
    "BaseRate",
    "Bin",
    "Curve",
    "DataRef",
    "DetectorRef",
    "FoldReport",
    "FormatReport",
    "Histogram",
    "LeaveOneOut",
    "ReliabilityReport",
    "Report",
    "Row",
    "Share",
    "SliceReport",
    "Split",
    "SplitPolicy",
    "SweepPoint",
    "Table",
    "ThresholdReport",
]

DETECTOR = "detector"
"""The name of the detector's own row."""
CARD_NAME = "probe"
"""What cards call it."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitPolicy(StrEnum):
    """How the measured rows are kept apart from those that the detector was fitted on."""

    HELD_OUT_SOURCES = "held_out_sources"
    """No source, group or text stands on both sides."""
    GROUPED = "grouped"
    """No group and no text does; sources do."""
    UNCHECKED = "unchecked"
    """The training rows were not given, so nobody has looked."""


class Curve(_Strict):
    """A ROC curve, thinned."""

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


class Row(_Strict):
    """One scorer in the table."""

    name: str = Field(description="'detector', or a control")
    auroc: Estimate
    auprc: Estimate
    tpr: tuple[RateAt, ...]
    difference: Estimate | None = Field(default=None, description="AUROC of the detector minus this one, paired")
    curve: Curve

    def card(self) -> dict[str, Any]:
        """As a card holds it."""
        found = Quality(self.auroc, self.auprc, self.tpr).report()
        return found if self.difference is None else {**found, "detector_minus_it": self.difference.rounded()}


class Band(_Strict):
    """A control that is drawn many times: the median and the middle 95 % of its AUROC."""

    name: Control
    draws: int = Field(gt=0)
    median: float
    low: float
    high: float


class Absent(_Strict):
    """A control that was not measured."""

    name: Control
    reason: str
    applies: bool = Field(default=True, description="False: it has no meaning for a detector of this kind")


class Table(_Strict):
    """A detector and all controls on the same rows and resamples."""

    num_positive: int = Field(gt=0)
    num_negative: int = Field(gt=0)
    num_groups: int = Field(gt=0, description="clusters of the bootstrap")
    detector: Row
    controls: tuple[Row, ...]
    bands: tuple[Band, ...] = ()
    absent: tuple[Absent, ...] = ()

    def control(self, name: Control) -> Row | None:
        """The row of a control; None where it was not measured, or only as a band."""
        return next((row for row in self.controls if row.name == name.value), None)

    def card(self) -> dict[str, Any]:
        """As a card holds it: rounded, by the scorers' names."""
        return {
            "num_positive": self.num_positive,
            "num_negative": self.num_negative,
            CARD_NAME: self.detector.card(),
            **{row.name: row.card() for row in self.controls},
            **{
                band.name.value: {"auroc": [round(value, 3) for value in (band.median, band.low, band.high)]}
                for band in self.bands
            },
        }


class Share(_Strict):
    """So many of so many, with the exact binomial 95 % interval (Clopper and Pearson, 1934)."""

    count: int = Field(ge=0)
    of: int = Field(gt=0)
    low: float
    high: float


class BaseRate(_Strict):
    """What alarms are worth where positives are rare."""

    prevalence: float
    positive_value: float = Field(description="share of the alarms that is right")
    alarms: float = Field(description="per 10,000 requests")


class ThresholdReport(_Strict):
    """What the calibrated threshold does on these rows."""

    threshold: float
    by_length: bool = Field(description="whether the card has other thresholds by length, which are used here")
    target_fpr: float
    certified: bool
    num_benign: int = Field(description="benign requests that it rests on")
    caught: Share
    false_alarms: Share
    base_rates: tuple[BaseRate, ...] = Field(description="with the share caught here and the promised rate")


class SliceReport(_Strict):
    """One part of the set; where it holds one label alone, its AUROC is against all rows of the other."""

    key: SliceKey
    value: str
    num_positive: int
    num_negative: int
    auroc: Estimate | None
    caught: Share | None
    false_alarms: Share | None


class Bin(_Strict):
    """A bin of the reliability curve."""

    mean_probability: float
    share_positive: float
    rows: int


class ReliabilityReport(_Strict):
    """What the card's Platt scaling says, and what is true at this set's share of positives."""

    error: float = Field(description="expected calibration error, 15 bins of equal mass")
    brier: Estimate
    bins: tuple[Bin, ...]


class Histogram(_Strict):
    """How many rows of each label lie in each of the bins; statistics of minus infinity in the first."""

    edges: tuple[float, ...]
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


class FoldReport(_Strict):
    """One source held out."""

    source: str
    num_positive: int
    num_negative: int
    detector: Estimate
    peers: dict[Control, Estimate]


class LeaveOneOut(_Strict):
    """The detector's fit and its text peers', each source of positives held out in turn."""

    folds: tuple[FoldReport, ...] = Field(min_length=1)
    detector: Estimate = Field(description="mean AUROC over the folds")
    peers: dict[Control, Estimate]


class FormatReport(_Strict):
    """All figures in one format."""

    aggregate: AnyAggregator
    table: Table
    threshold: ThresholdReport
    slices: tuple[SliceReport, ...]
    histogram: Histogram
    reliability: ReliabilityReport | None = Field(description="None: the card holds no Platt scaling")
    delay: Delay | None = Field(description="at the stage stream, in tokens")
    leave_one_out: LeaveOneOut | None = Field(description="None: see refit")
    in_distribution: Estimate | None = Field(
        description="AUROC of the same fit where the training rows are split at random: what a careless split shows"
    )
    trivial_in_training: dict[Control, float] = Field(description="AUROC of length and question mark on training rows")
    verdict: Verdict


class DetectorRef(_Strict):
    """Which detector."""

    name: str
    kind: str
    tensors_digest: Digest
    model_id: str
    weight_digest: Digest


class DataRef(_Strict):
    """Which rows: not their texts, but what proves them."""

    file: str
    digest: Digest = Field(description="over labels, texts and responses, whatever their order")
    rows: int
    sources: dict[str, int]


class Split(_Strict):
    """How measured rows and training rows are kept apart."""

    policy: SplitPolicy
    removed: int = Field(ge=0, description="rows that stand in the training rows too, by text or group: not measured")


class SweepPoint(_Strict):
    """One setting of the training's search."""

    layer: int
    aggregate: str
    fitter: str
    auroc: float


class Report(_Strict):
    """One evaluation of one detector."""

    format_version: Literal[1] = 1
    detector: DetectorRef
    stage: Stage
    data: DataRef
    training_data: DataRef | None
    split: Split
    seed: int
    resamples: int = Field(gt=0)
    refit: str = Field(description="how the detector's fit was repeated, or why it was not")
    notes: tuple[str, ...] = ()
    layer_sweep: tuple[SweepPoint, ...] = ()
    formats: dict[Format, FormatReport] = Field(min_length=1)
    verdict: Verdict = Field(description="the least favourable of the formats'")
    created_by: str

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
