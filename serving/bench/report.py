"""The report: figures, what they rest on, and whether the goal is met; as JSON and as Markdown. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from serving.bench import memory
from serving.bench.figures import STEERED_GOAL, THROUGHPUT_GOAL, Figures, table
from serving.bench.load import Sample, Workload
from serving.bench.machine import Machine
from serving.bench.memory import Memory
from serving.bench.rounds import Agreement, Comparison, Turn

MIN_ROUNDS = 15
"""With fewer, the run is a trial and the goal is not judged."""
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
        environment: what ``telltale serve`` sets in its environment; both servers were started with it.
        monitored: what Telltale read, enforced and wrote, in a few sentences.
        workload: one turn.
        started: with its time zone.
        seconds: that the measured rounds took, warm-up included.
        steered: whether Telltale steered every request.
    """

    command: str
    model: str
    flags: tuple[str, ...]
    environment: Mapping[str, str]
    monitored: str
    workload: Workload
    started: datetime
    seconds: float
    steered: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is written down."""

    machine: Machine
    setting: Setting
    comparison: Comparison
    memory: tuple[Memory, ...]

    @property
    def trial(self) -> bool:
        """Whether there are too few rounds to judge."""
        return len(self.comparison.rounds) < MIN_ROUNDS

    @property
    def identical(self) -> bool:
        """Whether monitoring left every generated token as it was."""
        return self.comparison.steady.differing == self.comparison.burst.differing == 0

    @property
    def steady(self) -> Figures:
        """Of the steady load."""
        rounds = self.comparison.rounds
        plain, telltale = tuple(one.plain.steady for one in rounds), tuple(one.telltale.steady for one in rounds)
        return Figures("steady", plain, telltale, self._goal)

    @property
    def burst(self) -> Figures:
        """Of the bursts."""
        rounds = self.comparison.rounds
        plain, telltale = tuple(one.plain.burst for one in rounds), tuple(one.telltale.burst for one in rounds)
        return Figures("burst", plain, telltale, self._goal)

    @property
    def _goal(self) -> float:
        return STEERED_GOAL if self.setting.steered else THROUGHPUT_GOAL

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``overhead-<device>.json`` and ``.md``; steered, ``steered-<device>``; of a trial, ``...-trial``."""
        folder.mkdir(parents=True, exist_ok=True)
        name = (
            f"{'steered' if self.setting.steered else 'overhead'}-{self.machine.device}{'-trial' if self.trial else ''}"
        )
        as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
        as_json.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        as_markdown.write_text(self.markdown(), encoding="utf-8")
        return as_json, as_markdown

    def content(self) -> dict[str, object]:
        """The report as plain data, with every round."""
        setting, comparison = self.setting, self.comparison
        return {
            "format_version": 2,
            "benchmark": "overhead",
            "trial": self.trial,
            "date": setting.started.isoformat(timespec="seconds"),
            "seconds": round(setting.seconds, 1),
            "command": setting.command,
            "machine": asdict(self.machine),
            "model": setting.model,
            "flags": list(setting.flags),
            "environment": dict(setting.environment),
            "monitored": setting.monitored,
            "steered": setting.steered,
            "workload": asdict(setting.workload),
            "kv_cache": asdict(comparison.cache),
            "starts": comparison.starts,
            "results": {
                "steady": self.steady.content(judged=not self.trial),
                "burst": self.burst.content(judged=not self.trial),
            },
            "checks": {
                "steady_replies": asdict(comparison.steady),
                "burst_replies": asdict(comparison.burst),
                "burst_prompt_tokens": setting.workload.burst.prompt_tokens,
                "burst_prompt_tokens_shared": comparison.shared_tokens,
                "burst_prefix_computed_once": comparison.computed_once,
                "monitor": asdict(comparison.seen),
            },
            "memory_bytes": [{"what": line.what, **asdict(line.footprint)} for line in self.memory],
            "rounds": [
                {
                    "first": "plain" if one.plain_first else "telltale",
                    "plain": _turn(one.plain),
                    "telltale": _turn(one.telltale),
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
        figures = table((self.steady, self.burst), judged=not self.trial)
        sections = (self._method(), self._checks(), memory.markdown(self.memory), self._machine())
        parts = [title, *trial, head, figures, _READING, *sections]
        return "\n\n".join(parts) + "\n"

    def _method(self) -> str:
        setting, cache = self.setting, self.comparison.cache
        steady, burst = setting.workload.steady, setting.workload.burst
        points = (
            "Both servers are alive at once; every process of the idle one is stopped (SIGSTOP). They take turns, "
            "and the order changes from round to round. A turn is the steady load and then one burst. The first round "
            "and the first requests of a turn do not count.",
            f"Both servers were started {self.comparison.starts} times, each time for a share of the rounds, in "
            "alternating order: where a process's memory happens to lie makes some per cent of its speed, for as long "
            "as it lives.",
            f"Both serve `{setting.model}` with the same flags: `{' '.join(setting.flags)}`. **Prefix caching is on in "
            f"both**; the KV cache has {cache.num_blocks} blocks of {cache.block_size} tokens.",
            "Both are started with what `telltale serve` sets in its environment: "
            f"`{' '.join(f'{name}={value}' for name, value in setting.environment.items())}`.",
            "On a CPU, vLLM's processes wait for one another in a loop; with Telltale they sleep "
            "(`serving/engine/waiting.py`). The ratios are of what an operator gets, and hold that too.",
            f"Telltale: {setting.monitored}",
            f"Steady, throughput: {steady.concurrent} concurrent completions of {steady.prompt_tokens} prompt tokens "
            f"and {steady.output_tokens} generated ones, from the first request to the last reply; generated tokens "
            "count.",
            f"Steady, time to first token: {steady.single} streams, one after the other, with "
            f"{steady.single_prompt_tokens} prompt tokens each; their median counts.",
            "Steady, prompts: the same in every round, with a `cache_salt` of their own each time, so that they are "
            "computed anew: none of their tokens came out of a prefix cache.",
            f"Burst: {burst.requests} streams, sent at once, that share a prefix of {burst.prefix_tokens} tokens and "
            f"end in {burst.ending_tokens} of their own; {burst.output_tokens} tokens are generated for each. "
            "Throughput counts generated tokens from the first request to the last token; the time to first token is "
            "the median of the streams. Each round has a new prefix, the same for both servers: it is in no cache "
            "when the burst comes.",
            f"Greedy, `ignore_eos`, random prompts (seed {setting.workload.seed}), the same for both servers. The load "
            "comes from the same machine.",
        )
        return "## How it was measured\n\n" + "\n".join(f"* {point}" for point in points)

    def _checks(self) -> str:
        comparison, seen = self.comparison, self.comparison.seen
        needed = self.setting.workload.burst.prompt_tokens - comparison.shared_tokens
        points = (
            f"Tokens, steady: {_agreement(comparison.steady)}",
            f"Tokens, burst: {_agreement(comparison.burst)}",
            self._prefix(needed),
            f"The monitor saw everything: {seen.requests:,} requests, {seen.scored:,} positions scored, "
            f"{seen.skipped:,} rightly skipped (the first one, and the last token, which is never fed back), "
            f"{seen.gaps} gaps, {seen.acted} rules fired.",
        )
        return "## What was checked\n\n" + "\n".join(f"* {point}" for point in points)

    def _prefix(self, needed: int) -> str:
        comparison, total = self.comparison, self.setting.workload.burst.prompt_tokens
        said = (
            "in every burst, both servers computed the shared prefix once"
            if comparison.computed_once
            else "**not in every burst did both servers compute the shared prefix once**"
        )
        return (
            f"Prefix: {said}. A burst has {total:,} prompt tokens; {comparison.shared_tokens:,} of them are full "
            f"blocks of the prefix that a request before has computed or is computing, and {needed:,} are left. "
            f"Taken from the cache, as vLLM counts them: {_spread([one.plain for one in comparison.rounds])} by plain "
            f"vLLM, {_spread([one.telltale for one in comparison.rounds])} by Telltale (a canary of Telltale that "
            "falls into a burst adds its own computed tokens)."
        )

    def _machine(self) -> str:
        machine = self.machine
        versions = ", ".join(f"{name} {found}" for name, found in machine.versions.items())
        return (
            f"## Machine\n\n{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB, {machine.system}; load "
            f"before the start {machine.load}. {versions}.\n\nThe raw rounds are in the JSON file beside this one."
        )


def _agreement(found: Agreement) -> str:
    tokens = (
        f"all {found.replies} replies of Telltale are, token for token, what plain vLLM gave to the prompt."
        if not found.differing
        else f"**{found.differing} of {found.replies} replies of Telltale are none that plain vLLM gave to the same "
        "prompt: these figures are not a result.**"
    )
    itself = (
        "one and the same reply every time" if found.plain_variants == 1 else f"up to {found.plain_variants} replies"
    )
    return f"{tokens} To one prompt, plain vLLM itself gave {itself}."


def _spread(turns: Sequence[Turn]) -> str:
    cached = [turn.burst_prompts.cached for turn in turns]
    hits = [turn.burst_prompts.hits for turn in turns]
    computed = [turn.burst_prompts.computed for turn in turns]
    return f"{_range(cached)} tokens (`vllm:prefix_cache_hits` {_range(hits)}), computed: {_range(computed)},"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _turn(turn: Turn) -> dict[str, object]:
    return {
        "steady": _sample(turn.steady),
        "burst": _sample(turn.burst) | {"prompt_tokens": asdict(turn.burst_prompts)},
    }


def _sample(sample: Sample) -> dict[str, object]:
    return {
        "throughput_seconds": round(sample.seconds, 6),
        "tokens": sample.tokens,
        "tokens_per_second": round(sample.throughput, 4),
        "ttft_seconds": [round(value, 6) for value in sample.first_seconds],
    }
