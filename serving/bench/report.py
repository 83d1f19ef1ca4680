"""The report: figures, what they rest on, and whether the goal is met; as JSON and as Markdown. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from serving.bench.load import Sample, Workload
from serving.bench.machine import Machine
from serving.bench.rounds import Comparison, Round
from serving.bench.statistics import Estimate, PairedRatio, paired_ratio

MIN_ROUNDS = 15
"""With fewer, the run is a trial and the goal is not judged."""
THROUGHPUT_GOAL = 0.98
TTFT_GOAL = 1.03
_READING = (
    "The columns of the servers are medians over rounds. A ratio is Telltale over plain vLLM within one round; the "
    "intervals are bootstrap percentiles over rounds. The goals are for the geometric mean: every round counts."
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What was run.

    Attributes:
        command: as typed.
        model: as named.
        flags: vLLM's, the same for both servers.
        monitored: what Telltale read and enforced, in one sentence.
        workload: one round.
        started: with its time zone.
        seconds: that the measured rounds took, warm-up included.
    """

    command: str
    model: str
    flags: tuple[str, ...]
    monitored: str
    workload: Workload
    started: datetime
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is written down."""

    machine: Machine
    setting: Setting
    comparison: Comparison

    @property
    def trial(self) -> bool:
        """Whether there are too few rounds to judge."""
        return len(self.comparison.rounds) < MIN_ROUNDS

    @property
    def identical(self) -> bool:
        """Whether monitoring left every generated token as it was."""
        return self.comparison.differing == 0

    @property
    def throughput(self) -> PairedRatio:
        """Telltale over plain vLLM; larger is better."""
        rounds = self.comparison.rounds
        return paired_ratio([one.telltale.throughput for one in rounds], [one.plain.throughput for one in rounds])

    @property
    def ttft(self) -> PairedRatio:
        """Telltale over plain vLLM; smaller is better."""
        rounds = self.comparison.rounds
        return paired_ratio([one.telltale.ttft_seconds for one in rounds], [one.plain.ttft_seconds for one in rounds])

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``overhead-<device>.json`` and ``.md`` (a trial: ``overhead-<device>-trial``)."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"overhead-{self.machine.device}{'-trial' if self.trial else ''}"
        as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
        as_json.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        as_markdown.write_text(self.markdown(), encoding="utf-8")
        return as_json, as_markdown

    def content(self) -> dict[str, object]:
        """The report as plain data, with every round."""
        setting, comparison = self.setting, self.comparison
        plain, telltale = _column(comparison.rounds)
        return {
            "format_version": 1,
            "benchmark": "overhead",
            "trial": self.trial,
            "date": setting.started.isoformat(timespec="seconds"),
            "seconds": round(setting.seconds, 1),
            "command": setting.command,
            "machine": asdict(self.machine),
            "model": setting.model,
            "flags": list(setting.flags),
            "monitored": setting.monitored,
            "workload": asdict(setting.workload),
            "results": {
                "throughput": _result(
                    self.throughput,
                    "generated tokens per second",
                    [s.throughput for s in plain],
                    [s.throughput for s in telltale],
                ),
                "ttft": _result(
                    self.ttft, "seconds", [s.ttft_seconds for s in plain], [s.ttft_seconds for s in telltale]
                ),
            },
            "goals": {
                "throughput": {"at_least": THROUGHPUT_GOAL, "met": self._met(self._throughput_met)},
                "ttft": {"at_most": TTFT_GOAL, "met": self._met(self._ttft_met)},
            },
            "checks": {
                "replies_compared": comparison.replies,
                "replies_differing": comparison.differing,
                "plain_variants_of_one_prompt": comparison.plain_variants,
                "monitor": asdict(comparison.seen),
            },
            "rounds": [
                {
                    "first": "plain" if one.plain_first else "telltale",
                    "plain": _sample(one.plain),
                    "telltale": _sample(one.telltale),
                }
                for one in comparison.rounds
            ],
        }

    def markdown(self) -> str:
        """The report for people."""
        setting, rounds = self.setting, len(self.comparison.rounds)
        title = f"# What monitoring costs: Telltale against plain vLLM on {self.machine.device}"
        trial = [f"**A trial: the goals are judged from {MIN_ROUNDS} rounds on.**"] if self.trial else []
        head = f"{setting.started:%Y-%m-%d}, `{setting.command}`, {rounds} rounds, {setting.seconds / 60:.0f} minutes."
        parts = [title, *trial, head, self._table(), _READING, self._method(), self._checks(), self._machine()]
        return "\n\n".join(parts) + "\n"

    def _table(self) -> str:
        plain, telltale = _column(self.comparison.rounds)
        throughputs = [_median([sample.throughput for sample in column]) for column in (plain, telltale)]
        ttfts = [_median([sample.ttft_seconds * 1e3 for sample in column]) for column in (plain, telltale)]
        rows = (
            ("", "plain vLLM", "Telltale", "ratio, geometric mean (95 %)", "ratio, median (95 %)", "goal", ""),
            ("---",) * 7,
            (
                "throughput, tokens/s",
                *(f"{value:.1f}" for value in throughputs),
                *_cells(self.throughput),
                f">= {THROUGHPUT_GOAL}",
                self._verdict(self._throughput_met),
            ),
            (
                "time to first token, ms",
                *(f"{value:.1f}" for value in ttfts),
                *_cells(self.ttft),
                f"<= {TTFT_GOAL}",
                self._verdict(self._ttft_met),
            ),
        )
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _method(self) -> str:
        setting, work = self.setting, self.setting.workload
        points = (
            "Both servers are alive throughout; every process of the idle one is stopped (SIGSTOP). They take turns, "
            "and the order changes from round to round. The first round and the first requests of a turn do not count.",
            f"Both serve `{setting.model}` with the same flags: `{' '.join(setting.flags)}`. **Prefix caching is off "
            "in both**: every round sends the same prompts, and has to compute them anew.",
            f"Telltale: {setting.monitored}",
            f"Throughput: {work.concurrent} concurrent completions of {work.prompt_tokens} prompt tokens and "
            f"{work.output_tokens} generated ones, from the first request to the last reply; generated tokens count.",
            f"Time to first token: {work.single} streams, one after the other, with {work.single_prompt_tokens} prompt "
            "tokens each; their median counts.",
            f"Greedy, `ignore_eos`, the same random prompts (seed {work.seed}) for both and in every round. The load "
            "comes from the same machine.",
        )
        return "## How it was measured\n\n" + "\n".join(f"* {point}" for point in points)

    def _checks(self) -> str:
        comparison, seen = self.comparison, self.comparison.seen
        tokens = (
            f"all {comparison.replies} replies of Telltale are, token for token, what plain vLLM gave to the prompt."
            if self.identical
            else f"**{comparison.differing} of {comparison.replies} replies of Telltale are none that plain vLLM gave "
            "to the same prompt: these figures are not a result.**"
        )
        variants = comparison.plain_variants
        itself = "one and the same reply every time" if variants == 1 else f"up to {variants} replies"
        points = (
            f"Tokens: {tokens} To one prompt, plain vLLM itself gave {itself}.",
            f"The monitor saw everything: {seen.requests:,} requests, {seen.scored:,} positions scored, "
            f"{seen.skipped:,} rightly skipped (the first one, and the last token, which is never fed back), "
            f"{seen.gaps} gaps, {seen.acted} rules fired.",
        )
        return "## What was checked\n\n" + "\n".join(f"* {point}" for point in points)

    def _machine(self) -> str:
        machine = self.machine
        versions = ", ".join(f"{name} {found}" for name, found in machine.versions.items())
        return (
            f"## Machine\n\n{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB, {machine.system}; load "
            f"before the start {machine.load}. {versions}.\n\nThe raw rounds are in the JSON file beside this one."
        )

    @property
    def _throughput_met(self) -> bool:
        return self.throughput.geometric_mean.point >= THROUGHPUT_GOAL

    @property
    def _ttft_met(self) -> bool:
        return self.ttft.geometric_mean.point <= TTFT_GOAL

    def _met(self, met: bool) -> bool | None:
        return None if self.trial else met

    def _verdict(self, met: bool) -> str:
        return "not judged" if self.trial else "met" if met else "**not met**"


def _column(rounds: Sequence[Round]) -> tuple[list[Sample], list[Sample]]:
    return [one.plain for one in rounds], [one.telltale for one in rounds]


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


def _sample(sample: Sample) -> dict[str, object]:
    return {
        "throughput_seconds": round(sample.seconds, 6),
        "tokens": sample.tokens,
        "tokens_per_second": round(sample.throughput, 4),
        "ttft_seconds": [round(value, 6) for value in sample.first_seconds],
    }
