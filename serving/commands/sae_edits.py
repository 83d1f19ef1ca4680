"""``telltale sae edits``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from serving.commands.model import say
from serving.commands.sae_features import FeaturesError, format_of, model_of
from serving.commands.sae_vector import safety_of
from serving.commands.steer_words import repeating, say_verdict, strengths_of

if TYPE_CHECKING:
    from probes.sae.edits import Edit
    from probes.sae.file import SaeFile

__all__ = ["EditsOptions", "EditsTrial", "edits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditsOptions:
    """As on the command line: which edits."""

    pairs: Path
    name: str
    more_is: str
    each: int
    max_dose: float
    text_format: str
    model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditsTrial:
    """As on the command line: how they are measured; not at all without prompts."""

    prompts: Path | None
    instruction: str | None
    examples: Path | None
    strengths: str
    max_tokens: int
    seeds: int
    neutral_lines: int
    report: Path | None


def edits(sae: Path, options: EditsOptions, trial: EditsTrial) -> None:
    """Choose latents to raise and to reduce, and print them as steers; measure them where prompts are given.

    Raises:
        probes.errors.TelltaleError: the SAE, the pairs, an option or the model are not usable.
    """
    from probes.packs.saes import open_sae
    from probes.sae.edits import edits_of_pairs

    safety = safety_of(options.more_is)
    if (trial.prompts is None) != (trial.instruction is None):
        raise FeaturesError("--prompts and --instruction stand together: what is asked, and how a prompt asks for it.")
    strengths = strengths_of(trial.strengths)
    folder, model_id = model_of(options.model)
    file = open_sae(sae)
    found = edits_of_pairs(
        file,
        folder,
        options.pairs,
        model_id=model_id,
        text_format=format_of(options.text_format),
        each=options.each,
        progress=say,
    )
    typer.echo("steers:")
    for edit in found:
        line = edit.as_yaml(options.name, sae, more_is=safety, max_dose=options.max_dose)
        typer.echo(f"{line}  # {edit.information:.3f} nats")
    if trial.prompts is not None and trial.instruction is not None:
        _measure(sae, file, found, options, trial, strengths)


def _measure(  # noqa: PLR0917 - all of one command line
    sae: Path,
    file: SaeFile,
    found: Sequence[Edit],
    options: EditsOptions,
    asked: EditsTrial,
    strengths: Sequence[float],
) -> None:
    from probes.fit.steer.behaviour import Judge, read_examples
    from probes.fit.steer.joint_evaluation import write_joint_report
    from probes.fit.steer.report import response_table
    from probes.fit.steer.steered_model import SteeredModel
    from probes.fit.steer.trial import Trial, read_prompts
    from probes.modelref import read_model_ref
    from probes.sae.edits_evaluation import evaluate_edits

    trial = Trial(
        prompts=read_prompts(asked.prompts or Path()),
        instruction=asked.instruction or "",
        max_dose=options.max_dose,
        max_tokens=asked.max_tokens,
        seeds=asked.seeds,
        neutral_lines=asked.neutral_lines,
    )
    judge = Judge.fit(read_examples(asked.examples or options.pairs), seed=trial.seed)
    say(f"judge: AUROC {judge.auroc.value:.3f} on texts that it has not seen")
    folder, model_id = model_of(options.model)
    model = read_model_ref(folder, model_id=model_id, dtype=file.card.model.dtype)
    file.require_model(model)
    measured = evaluate_edits(
        options.name,
        file,
        found,
        trial,
        strengths,
        judge=judge,
        model=SteeredModel(folder, model=model),
        progress=say,
    )
    typer.echo(response_table(measured.response))
    say_verdict(measured.verdict)
    if asked.report is not None:
        say(f"wrote {write_joint_report(measured, asked.report, command=_command(sae, options, asked))}")


def _command(sae: Path, options: EditsOptions, trial: EditsTrial) -> str:
    """The line that repeats it."""
    words = ["telltale", "sae", "edits", str(sae)]
    given = (
        ("--pairs", options.pairs),
        ("--name", options.name),
        ("--more-is", options.more_is),
        ("--each", options.each),
        ("--max-dose", f"{options.max_dose:g}"),
        ("--format", options.text_format),
        ("--model", options.model),
        ("--prompts", trial.prompts),
        ("--instruction", trial.instruction),
        ("--examples", trial.examples),
        ("--strengths", trial.strengths),
        ("--max-tokens", trial.max_tokens),
        ("--seeds", trial.seeds),
        ("--neutral-lines", trial.neutral_lines),
        ("--report", trial.report),
    )
    return repeating(words, given)
