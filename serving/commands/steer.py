"""``telltale steer``: is a direction worth writing, and does the model use a detector's direction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import serving
from probes.artifact import Artifact
from probes.errors import TelltaleError, did_you_mean
from probes.modelref import read_model_ref
from probes.steering.artifact import SteerArtifact
from probes.steering.steer import Positions
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say
from serving.commands.steer_words import repeating, say_verdict, strengths_of


class SteerCommandError(TelltaleError, ValueError):
    """An option of the command cannot be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What ``telltale steer eval`` was asked for, as on the command line."""

    op: str
    strengths: str | None
    positions: str
    max_dose: float
    prompts: Path
    examples: Path
    instruction: str
    model: str | None
    max_tokens: int
    seeds: int
    neutral_lines: int
    report: Path | None

    def command(self, artifact: Path) -> str:
        """The line that repeats it."""
        words = ["telltale", "steer", "eval", str(artifact), "--op", self.op]
        given = (
            ("--strengths", self.strengths),
            ("--positions", self.positions),
            ("--max-dose", f"{self.max_dose:g}"),
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


def evaluate(path: Path, options: EvalOptions) -> None:
    """Measure a steer at several strengths, beside random directions and a prompt, and write the verdict.

    Raises:
        probes.errors.TelltaleError: an option, a file or the model is not usable.
    """
    artifact = SteerArtifact.load(path)
    positions = positions_of(options.positions)
    strengths = strengths_of(options.strengths) if options.strengths is not None else ()

    from probes.fit.steer.behaviour import Judge, read_examples
    from probes.fit.steer.evaluation import evaluate_steer
    from probes.fit.steer.steered_model import SteeredModel
    from probes.fit.steer.trial import Trial, default_strengths, operators_at, read_prompts

    if options.report is not None:
        _require_report(options.report)
    trial = Trial(
        prompts=read_prompts(options.prompts),
        instruction=options.instruction,
        operators=operators_at(options.op, strengths or default_strengths(options.op)),
        positions=positions,
        max_dose=options.max_dose,
        max_tokens=options.max_tokens,
        seeds=options.seeds,
        neutral_lines=options.neutral_lines,
    )
    judge = Judge.fit(read_examples(options.examples), seed=trial.seed)
    say(f"judge: AUROC {judge.auroc.value:.3f} on texts that it has not seen")
    folder = model_folder(options.model)
    model = read_model_ref(folder, model_id=options.model or DEFAULT_MODEL, dtype=artifact.card.model.dtype)
    artifact.require_model(model)
    found = evaluate_steer(
        artifact,
        trial,
        judge,
        model=SteeredModel(folder, model=model),
        created_by=serving.__version__,
        progress=say,
    )
    found.write_card()
    if options.report is not None:
        from probes.fit.steer.report import write_report

        say(f"wrote {write_report(found, options.report, command=options.command(path))}")
    say_verdict(found.verdict)


def causal(
    path: Path,
    *,
    pairs: Path,
    model: str | None,
    strength: float,
    directions: int,
    neutral_lines: int,
    out: Path | None,
    card: bool,
) -> None:
    """Measure whether the model uses a detector's direction; the level goes onto the detector's card.

    Raises:
        probes.errors.TelltaleError: an option, a file or the model is not usable.
    """
    artifact = Artifact.load(path)

    from probes.fit.steer.causal import measure_causal
    from probes.fit.steer.causal_cases import read_cases
    from probes.fit.steer.steered_model import SteeredModel

    cases = read_cases(pairs)
    folder = model_folder(model)
    served = read_model_ref(folder, model_id=model or DEFAULT_MODEL, dtype=artifact.card.model.dtype)
    artifact.require_model(served)
    found = measure_causal(
        artifact,
        cases,
        model_dir=folder,
        model=SteeredModel(folder, model=served),
        strength=strength,
        directions=directions,
        neutral_lines=neutral_lines,
        seed=0,
        created_by=serving.__version__,
        progress=say,
    )
    if card:
        found.write_card(artifact)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        say(f"wrote {out}")
    for label, base in found.base.items():
        share, nats = base["prefer_target"], base["preference"]
        say(f"{label}: {share:.0%} of {base['cases']} prefer the target, by {nats:+.3f} nats in the mean")
    for name, test in (("ablated", found.necessary), ("added", found.sufficient), ("KL of addition", found.kl)):
        say(f"{name}: {test.effect:.4f}, p {test.p:.4f}; random at most {max(test.null):.4f}")
    level = found.level
    say("level: none" if level is None else f"level: L{level.value}, {level.name.lower().replace('_', ' ')}")


def model_folder(model: str | None) -> Path:
    """The folder of a model, of the embedded one if none is named."""
    chosen = model or DEFAULT_MODEL
    return embedded_folder(chosen) or Path(chosen)


def positions_of(word: str) -> Positions:
    """Which rows.

    Raises:
        SteerCommandError: there are no such.
    """
    known = [positions.value for positions in Positions]
    if word not in known:
        raise SteerCommandError(f"--positions is {word!r}. {did_you_mean(word, known)}")
    return Positions(word)


def _require_report(folder: Path) -> None:
    """Fail now, not after minutes of measuring."""
    if find_spec("matplotlib") is None:
        raise SteerCommandError(
            "--report draws a plot with matplotlib, which is not installed. Install the extra 'train', or leave it "
            "out: the figures stand on the card."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerCommandError(f"--report {folder}: no folder can be made there ({error.strerror}).") from error
