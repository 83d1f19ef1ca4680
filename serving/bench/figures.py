"""The figures of one workload: paired ratios of throughput and first token, and the goals they are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from serving.bench.load import Sample
from serving.bench.statistics import Estimate, PairedRatio, paired_ratio

THROUGHPUT_GOAL = 0.98
STEERED_GOAL = 0.97
TTFT_GOAL = 1.03


@dataclass(frozen=True, slots=True)
class Figures:
    """One workload, measured in pairs.

    Attributes:
        name: of the workload, for people.
        plain, telltale: one sample a round; the same position in both is one pair.
        goal: for the throughput.
    """

    name: str
    plain: tuple[Sample, ...]
    telltale: tuple[Sample, ...]
    goal: float = THROUGHPUT_GOAL

    @property
    def throughput(self) -> PairedRatio:
        """Telltale over plain vLLM; larger is better."""
        return paired_ratio([one.throughput for one in self.telltale], [one.throughput for one in self.plain])

    @property
    def ttft(self) -> PairedRatio:
        """Telltale over plain vLLM; smaller is better."""
        return paired_ratio([one.ttft_seconds for one in self.telltale], [one.ttft_seconds for one in self.plain])

    def content(self, *, judged: bool) -> dict[str, object]:
        """As plain data.

        Args:
            judged: whether there are enough rounds to say that a goal is met.
        """
        throughput, ttft = self.throughput, self.ttft
        return {
            "throughput": _result(
                throughput,
                "generated tokens per second",
                [one.throughput for one in self.plain],
                [one.throughput for one in self.telltale],
            )
            | {"goal": {"at_least": self.goal, "met": self._throughput_met(throughput) if judged else None}},
            "ttft": _result(
                ttft,
                "seconds",
                [one.ttft_seconds for one in self.plain],
                [one.ttft_seconds for one in self.telltale],
            )
            | {"goal": {"at_most": TTFT_GOAL, "met": _ttft_met(ttft) if judged else None}},
        }

    def rows(self, *, judged: bool) -> tuple[tuple[str, ...], ...]:
        """Two rows of the report's table, under ``HEADER``; ``judged`` as for ``content``."""
        throughput, ttft = self.throughput, self.ttft
        return (
            (
                f"{self.name}: throughput, tokens/s",
                *(f"{_median([one.throughput for one in column]):.1f}" for column in (self.plain, self.telltale)),
                *_cells(throughput),
                f">= {self.goal}",
                _verdict(self._throughput_met(throughput), judged=judged),
            ),
            (
                f"{self.name}: time to first token, ms",
                *(
                    f"{_median([one.ttft_seconds for one in column]) * 1e3:.1f}"
                    for column in (self.plain, self.telltale)
                ),
                *_cells(ttft),
                f"<= {TTFT_GOAL}",
                _verdict(_ttft_met(ttft), judged=judged),
            ),
        )

    def _throughput_met(self, ratio: PairedRatio) -> bool:
        return ratio.geometric_mean.point >= self.goal


HEADER = ("", "plain vLLM", "Telltale", "ratio, geometric mean (95 %)", "ratio, median (95 %)", "goal", "")


def table(figures: Sequence[Figures], *, judged: bool) -> str:
    """The report's table in Markdown; ``judged`` as for ``Figures.content``."""
    rows = [HEADER, ("---",) * len(HEADER), *(row for one in figures for row in one.rows(judged=judged))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _ttft_met(ratio: PairedRatio) -> bool:
    return ratio.geometric_mean.point <= TTFT_GOAL


def _verdict(met: bool, *, judged: bool) -> str:
    return "not judged" if not judged else "met" if met else "**not met**"


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _cells(ratio: PairedRatio) -> list[str]:
    return [
        f"{estimate.point:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
        for estimate in (ratio.geometric_mean, ratio.median)
    ]


def _result(ratio: PairedRatio, unit: str, plain: Sequence[float], telltale: Sequence[float]) -> dict[str, object]:
    return {
        "unit": unit,
        "plain_median": round(_median(plain), 6),
        "telltale_median": round(_median(telltale), 6),
        "confidence": ratio.confidence,
        "ratio_geometric_mean": _estimate(ratio.geometric_mean),
        "ratio_median": _estimate(ratio.median),
        "ratios": [round(value, 6) for value in ratio.ratios],
    }


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {name: round(value, 6) for name, value in asdict(estimate).items()}
