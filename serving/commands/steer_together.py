"""``telltale steer together``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from probes.errors import TelltaleError, did_you_mean
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import say
from serving.commands.steer import model_folder
from serving.commands.steer_words import repeating, say_verdict, strengths_of

if TYPE_CHECKING:
    from monitor.entries import SteerEntry
    from monitor.yaml_file import PolicyFile
    from probes.card import ModelRef
    from probes.steering.steer import Steer

__all__ = ["TogetherError", "TogetherOptions", "together"]

_NAME = "together"


class TogetherError(TelltaleError, ValueError):
    """The steers cannot be measured together as asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TogetherOptions:
    """As on the command line."""

    steers: str
    less: bool
    strengths: str
    prompts: Path
    examples: Path
    instruction: str
    model: str | None
    max_tokens: int
    seeds: int
    neutral_lines: int
    report: Path | None

    def command(self, policy: Path) -> str:
        """The line that repeats it."""
        words = ["telltale", "steer", "together", str(policy), "--steers", self.steers]
        words += ["--less"] if self.less else []
        given = (
            ("--strengths", self.strengths),
            ("--prompts", self.prompts),
            ("--examples", self.examples),
            ("--instruction", self.instruction),
            ("--model", self.model),
            ("--max-tokens", self.max_tokens),
            ("--seeds", self.seeds),
            ("--neutral-lines", self.neutral_lines),
            ("--report", self.report),
        )
        return repeating(words, given)


def together(policy: Path, options: TogetherOptions) -> None:
    """Measure steers of a policy file as they are written together, beside random directions and a prompt.

    Raises:
        probes.errors.TelltaleError: an option, a file or the model is not usable.
    """
    from monitor.yaml_file import read_policy_file
    from probes.fit.steer.behaviour import Judge, read_examples
    from probes.fit.steer.joint import join
    from probes.fit.steer.joint_evaluation import evaluate_joint, require_strengths, write_joint_report
    from probes.fit.steer.report import response_table
    from probes.fit.steer.scaled import scaled
    from probes.fit.steer.steered_model import SteeredModel
    from probes.fit.steer.trial import Trial, read_prompts
    from probes.modelref import read_model_ref
    from probes.steering.base import Sign

    strengths = require_strengths(strengths_of(options.strengths))
    file = read_policy_file(policy)
    entries = _named(file, options.steers)
    folder = model_folder(options.model)
    model = read_model_ref(folder, model_id=options.model or file.config.model or DEFAULT_MODEL, dtype="float32")
    steers = _steers(file, entries, model)
    trial = Trial(
        prompts=read_prompts(options.prompts),
        instruction=options.instruction,
        positions=entries[0].positions,
        max_tokens=options.max_tokens,
        seeds=options.seeds,
        neutral_lines=options.neutral_lines,
    )
    judge = Judge.fit(read_examples(options.examples), seed=trial.seed)
    say(f"judge: AUROC {judge.auroc.value:.3f} on texts that it has not seen")
    found = evaluate_joint(
        [
            join(_NAME, [replace(steer, update=scaled(steer.update, factor)) for steer in steers], strength=factor)
            for factor in strengths
        ],
        [_said(entry) for entry in entries],
        trial,
        scaled="what each of them writes, before the limit of its dose",
        sign=Sign.LESS if options.less else Sign.MORE,
        judge=judge,
        model=SteeredModel(folder, model=model),
        progress=say,
    )
    typer.echo(response_table(found.response))
    say_verdict(found.verdict)
    if options.report is not None:
        say(f"wrote {write_joint_report(found, options.report, command=options.command(policy))}")


def _named(file: PolicyFile, names: str) -> list[SteerEntry]:
    known = {entry.name: entry for entry in file.config.steers}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise TogetherError(f"--steers: {file.path} has no steer {name!r}. {did_you_mean(name, known)}")
    if not wanted:
        raise TogetherError("--steers: name at least one steer of the policy file.")
    return [known[name] for name in wanted]


def _steers(file: PolicyFile, entries: Sequence[SteerEntry], model: ModelRef) -> list[Steer]:
    from probes.steering.steer import make_steer
    from serving.deployment import load_steers

    made = load_steers(file)
    for entry in entries:
        made[entry.name].require_model(model)
    return [
        # Evaluated, not served: what a steer does to safety is for the policy file to allow.
        make_steer(
            entry.name,
            made[entry.name],
            entry.operator(),
            positions=entry.positions,
            max_dose=entry.max_dose,
            allow_safety_reducing=True,
        )
        for entry in entries
    ]


def _said(entry: SteerEntry) -> str:
    what = f"latent {entry.latent} of {entry.sae}" if entry.sae is not None else str(entry.artifact)
    parameters = ", ".join(f"{key} {value}" for key, value in (entry.model_extra or {}).items())
    return f"`{entry.name}`: `{entry.op}` {what}" + (f", {parameters}" if parameters else "")
