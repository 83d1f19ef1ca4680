"""How fast ``telltale collect`` is against the engine alone, in turns: ``python -m serving.bench.collect``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from probes.fit.generated.twins import make_twins
from serving.arguments import engine_arguments
from serving.bench import BenchError
from serving.bench.machine import Machine, read_machine
from serving.bench.statistics import PairedRatio, paired_ratio
from serving.builtin import DEFAULT_MODEL, ensure_builtin_model

GOAL = 0.9
"""Tokens per second of collecting over those of the engine alone."""
TAPS = ("resid_post.9", "resid_post.15", "resid_post.21")
_LONGEST = 8
"""Requests joined to one prompt, at most."""
_SHARD_BYTES = 256 << 20
_SHARD_TOKENS = 65536


@dataclass(frozen=True, slots=True)
class Measured:
    """What the rounds gave.

    Attributes:
        plain, collecting: tokens per second of each round.
        ratio: of the second over the first.
        prompts, tokens: of one round.
        flags: vLLM's, of both.
    """

    plain: tuple[float, ...]
    collecting: tuple[float, ...]
    ratio: PairedRatio
    prompts: int
    tokens: int
    flags: tuple[str, ...]


class Side:
    """One of the two processes. It sleeps between its rounds."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process = process
        self._name = name

    def wait(self) -> None:
        """Until its engine has run all prompts once."""
        if self._answer() != "ready\n":
            raise BenchError(f"{self._name}: did not start; what it printed stands above.")

    def round(self) -> dict[str, Any]:
        """Run all prompts once: seconds and tokens."""
        assert self._process.stdin is not None  # noqa: S101 - started with a pipe
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._answer() or "{}")
        if not found:
            raise BenchError(f"{self._name}: ended in the middle; what it printed stands above.")
        return found

    def _answer(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - as above
        return self._process.stdout.readline()


@contextmanager
def side(name: str, order: Path) -> Iterator[Side]:
    """Start one side, and end it afterwards."""
    command = [sys.executable, "-m", "serving.engine.collect_speed", name, str(order)]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    with subprocess.Popen(  # noqa: S603 - our own program
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Side(process, name)
        finally:
            process.kill()


def measure(*, rounds: int, prompts: int, say: Callable[[str], None], model: str = DEFAULT_MODEL) -> Measured:
    """Run both sides in turns, each first in every other round.

    Args:
        rounds: at least two.
        prompts: of one round.
        say: told the figures of each round.
        model: an embedded one.

    Raises:
        BenchError: a side ended, or both did not compute the same number of tokens.
    """
    folder = ensure_builtin_model(model, progress=say).path
    flags = engine_arguments(model, (), folder)
    with tempfile.TemporaryDirectory(prefix="telltale-collect-") as name:
        work = Path(name)
        (work / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(prompts)))
        order: dict[str, Any] = {"prompts": str(work / "prompts.jsonl"), "out": str(work / "out"), "taps": TAPS}
        order |= {"model_id": model, "arguments": flags}
        order |= {"shard_bytes": _SHARD_BYTES, "shard_tokens": _SHARD_TOKENS}
        (work / "order.json").write_text(json.dumps(order))
        with side("plain", work / "order.json") as plain, side("collect", work / "order.json") as collecting:
            both = (plain, collecting)
            for one in both:
                one.wait()
            speeds: dict[Side, list[float]] = {one: [] for one in both}
            tokens = set()
            for number in range(rounds):
                for one in both if number % 2 == 0 else reversed(both):
                    found = one.round()
                    speeds[one].append(found["tokens"] / found["seconds"])
                    tokens.add(found["tokens"])
                say(f"round {number + 1}: {speeds[plain][-1]:.1f} and {speeds[collecting][-1]:.1f} tokens/s")
    if len(tokens) != 1:
        raise BenchError(f"the sides computed {sorted(tokens)} tokens of the same prompts: the figures are void.")
    ratio = paired_ratio(speeds[collecting], speeds[plain])
    return Measured(tuple(speeds[plain]), tuple(speeds[collecting]), ratio, prompts, tokens.pop(), tuple(flags[1:]))


def texts(count: int) -> list[str]:
    """Prompts of 1 to 8 requests each, the same each time."""
    lengths = [1 + number % _LONGEST for number in range(count)]
    twins = iter(make_twins(sum(lengths), random.Random(0)))  # noqa: S311 - no secret
    return [" ".join(next(twins).text for _ in range(length)) for length in lengths]


def markdown(found: Measured, machine: Machine, command: str) -> str:
    """The report."""
    ratio = found.ratio.geometric_mean
    rows = "\n".join(
        f"| {number} | {plain:.1f} | {collecting:.1f} | {collecting / plain:.3f} |"
        for number, (plain, collecting) in enumerate(zip(found.plain, found.collecting, strict=True), 1)
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return f"""\
# How fast activations are collected

`telltale collect` on the embedded model reaches **{ratio.point:.3f}** of the engine's own prefill throughput
({found.ratio.confidence:.0%} interval {ratio.low:.3f} to {ratio.high:.3f}; geometric mean of the rounds). The goal is
{GOAL}.

| round | vLLM alone, tokens/s | collecting, tokens/s | ratio |
| --- | --- | --- | --- |
{rows}

In a round both sides compute the same {found.prompts} chats with {found.tokens:,} tokens in all, one new token each,
without a prefix cache. Each side is first in every other round, and sleeps in the other's turn. A ratio
above 1 is the machine's noise: nothing is computed faster for being read.

* vLLM alone: `LLM.generate` with ready tokens, no taps.
* Collecting: all that the command does once its engine runs. The file is read and checked, chats are rendered with
  their roles (once to check every line, once to run it), every token's activation is captured at {len(TAPS)} taps, put
  in its place, written, synchronised to disk and digested.

| | |
| --- | --- |
| command | `{command}` |
| machine | {machine.cpu}, {machine.cores} cores; load {machine.load} before it |
| versions | {versions} |
| vLLM's flags | `{" ".join(found.flags)}` |
"""


def main(
    rounds: Annotated[int, typer.Option(min=2, help="In turns.")] = 6,
    prompts: Annotated[int, typer.Option(min=1, help="Of one round.")] = 240,
    out: Annotated[Path, typer.Option(help="The report.")] = Path("docs/benchmarks/collect.md"),
) -> None:
    """Measure, and write the report."""

    def say(text: str) -> None:
        typer.echo(text, err=True)

    machine = read_machine()
    measured = measure(rounds=rounds, prompts=prompts, say=say)
    out.write_text(
        markdown(measured, machine, f"python -m serving.bench.collect --rounds {rounds} --prompts {prompts}")
    )
    say(f"wrote {out}: {measured.ratio.geometric_mean.point:.3f}")
    if measured.ratio.geometric_mean.point < GOAL:
        raise BenchError(f"the goal is {GOAL}.")


if __name__ == "__main__":
    typer.run(main)
