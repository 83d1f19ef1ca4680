"""The report of ``telltale bench --audit``: figures and what they rest on, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from serving.bench.figures import THROUGHPUT_GOAL
from serving.bench.load import Workload
from serving.bench.machine import Machine
from serving.bench.outlets import Pair, Told
from serving.bench.statistics import PairedRatio, paired_ratio


@dataclass(frozen=True, slots=True)
class OutletsReport:
    """Everything that is written down.

    Attributes:
        machine: it was measured on.
        command: as typed.
        started: with its time zone.
        seconds: that it took.
        model: as named.
        flags: vLLM's, the same for both servers.
        workload: one turn.
        pairs: all rounds.
        told: what was checked.
        scrape_seconds: of the telling server's turns, between two scrapes.
    """

    machine: Machine
    command: str
    started: datetime
    seconds: float
    model: str
    flags: Sequence[str]
    workload: Workload
    pairs: tuple[Pair, ...]
    told: Told
    scrape_seconds: float

    @property
    def throughput(self) -> PairedRatio:
        """Of the telling server over the silent one."""
        return paired_ratio([p.telling.throughput for p in self.pairs], [p.silent.throughput for p in self.pairs])

    @property
    def ttft(self) -> PairedRatio:
        """Likewise, time to first token."""
        return paired_ratio([p.telling.ttft_seconds for p in self.pairs], [p.silent.ttft_seconds for p in self.pairs])

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``outlets-<device>.json`` and ``.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        as_json, as_markdown = (folder / f"outlets-{self.machine.device}.{kind}" for kind in ("json", "md"))
        as_json.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        as_markdown.write_text(self.markdown(), encoding="utf-8")
        return as_json, as_markdown

    def content(self) -> dict[str, object]:
        """The report as plain data, with every round."""
        return {
            "format_version": 1,
            "benchmark": "outlets",
            "date": self.started.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "command": self.command,
            "machine": asdict(self.machine),
            "model": self.model,
            "flags": list(self.flags),
            "workload": asdict(self.workload.steady),
            "throughput": asdict(self.throughput) | {"goal": THROUGHPUT_GOAL},
            "ttft": asdict(self.ttft),
            "scrape_seconds": self.scrape_seconds,
            "told": asdict(self.told),
            "rounds": [
                {
                    "first": "silent" if pair.silent_first else "telling",
                    "silent_tokens_per_second": round(pair.silent.throughput, 4),
                    "telling_tokens_per_second": round(pair.telling.throughput, 4),
                    "silent_ttft_seconds": round(pair.silent.ttft_seconds, 6),
                    "telling_ttft_seconds": round(pair.telling.ttft_seconds, 6),
                }
                for pair in self.pairs
            ],
        }

    def markdown(self) -> str:
        """The report for people."""
        steady, told = self.workload.steady, self.told
        rows = (
            ("", "silent", "telling", "ratio, geometric mean (95 %)", "ratio, median (95 %)", "goal"),
            ("---",) * 6,
            (
                "throughput, tokens/s",
                *_medians([(pair.silent.throughput, pair.telling.throughput) for pair in self.pairs]),
                *_cells(self.throughput),
                f">= {THROUGHPUT_GOAL}",
            ),
            (
                "time to first token, ms",
                *_medians([(1e3 * pair.silent.ttft_seconds, 1e3 * pair.telling.ttft_seconds) for pair in self.pairs]),
                *_cells(self.ttft),
                "-",
            ),
        )
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        machine = self.machine
        return (
            "# What it costs to write down and to tell\n\n"
            f"{self.started:%Y-%m-%d}, `{self.command}`, {len(self.pairs)} rounds, {self.seconds / 60:.0f} minutes; "
            f"{machine.cpu}, {machine.cores} cores, load before the start {machine.load}.\n\n"
            f"{table}\n\n"
            "Both servers are monitored alike. The telling one has an audit trail (SQLite, `before_release`, "
            "`text: full`), sends every event, allowed requests too, to a webhook on the same machine, and is scraped "
            f"every {self.scrape_seconds:g} s of its turns. The silent one has none of that. The counters behind "
            "`/metrics` are kept by "
            "both: what they cost is part of the [comparison with plain vLLM](overhead-cpu.md).\n\n"
            f"A turn: {steady.concurrent} concurrent completions of {steady.prompt_tokens} prompt tokens and "
            f"{steady.output_tokens} generated ones, then {steady.single} single streams. Both servers are alive, the "
            "idle one is stopped (SIGSTOP), and the order changes from round to round; the first round does not "
            "count.\n\n"
            f"Checked: {told.requests} requests were answered by the telling server; {told.events} have an event, the "
            f"chain holds, the webhook took {told.messages} messages, and the metrics were read {told.scrapes} times. "
            "No position was a gap in either server. The raw rounds are in the JSON file beside this one.\n"
        )


def _medians(values: Sequence[tuple[float, float]]) -> tuple[str, str]:
    silent, telling = (float(np.median([pair[place] for pair in values])) for place in (0, 1))
    return f"{silent:.1f}", f"{telling:.1f}"


def _cells(ratio: PairedRatio) -> tuple[str, str]:
    mean, median = ratio.geometric_mean, ratio.median
    return (
        f"{mean.point:.3f} ({mean.low:.3f} to {mean.high:.3f})",
        f"{median.point:.3f} ({median.low:.3f} to {median.high:.3f})",
    )
