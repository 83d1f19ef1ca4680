"""``telltale eval`` and ``telltale report``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import serving
from probes.artifact import Artifact
from probes.card import Format, Stage
from probes.errors import TelltaleError, did_you_mean
from probes.modelref import read_model_ref
from serving.builtin import DEFAULT_MODEL
from serving.commands.encoder import load_encoder, read_encoder
from serving.commands.model import embedded_folder, say

if TYPE_CHECKING:
    from probes.fit.evaluation.evaluation_rows import Rows

Word = TypeVar("Word", bound=StrEnum)


class EvaluateError(TelltaleError, ValueError):
    """An option of the command cannot be used."""


def evaluate(
    path: Path,
    *,
    data: Path | None,
    train: Path | None,
    recipe: Path | None,
    row_set: str | None,
    formats: Sequence[str],
    stage: str | None,
    encoder: str,
    model: str | None,
    seed: int,
    out: Path,
    card: bool,
) -> None:
    """Measure a detector beside its controls, and write the report.

    Raises:
        probes.errors.TelltaleError: an option, a file or the model is not usable.
    """
    artifact = Artifact.load(path)
    mixed = train is not None if recipe else row_set is not None
    if (data is None) == (recipe is None) or mixed:
        raise EvaluateError(
            "Give rows in one way: --data FILE (and --train FILE), or --recipe RECIPE (and --set NAME)."
        )
    chosen_encoder = read_encoder(encoder)
    chosen_stage = _stage_of(artifact, stage)
    calibrated = [item.format for item in artifact.card.calibrations if item.stage is chosen_stage]
    chosen_formats = [_word(Format, word, "--format") for word in formats] or calibrated or artifact.card.formats

    from probes.cachedir import user_cache_dir
    from probes.fit.evaluation.detector_evaluation import DetectorEvaluation
    from probes.fit.evaluation.evaluation_card import write_on_card
    from probes.fit.evaluation.lint import lint

    name = model or DEFAULT_MODEL
    folder = embedded_folder(name) or Path(name)
    cache = user_cache_dir()

    evaluation = DetectorEvaluation(
        artifact,
        _rows_of_files(data, train) if recipe is None else _rows_of_recipe(recipe, row_set, cache),
        model_dir=folder,
        model=read_model_ref(folder, model_id=name, dtype=artifact.card.model.dtype, cache_dir=cache),
        encoder=lambda: load_encoder(chosen_encoder, model_dir=folder, cache_dir=cache),
        cache_dir=cache,
        seed=seed,
        progress=say,
    )
    found = evaluation.report(
        chosen_stage, list(dict.fromkeys(chosen_formats)), created_by=f"telltale {serving.__version__}"
    )
    target = out / f"{artifact.card.name}.{chosen_stage.value}.json"
    found.write(target)
    if card:
        write_on_card(artifact, found)
    say(f"wrote {target}")
    verdict = found.verdict
    say(f"{verdict.grade.value}{f' ({verdict.shortcut})' if verdict.shortcut else ''}: rests on {verdict.rests_on}")
    for line in (*verdict.reasons, *found.notes):
        say(line)
    for finding in lint(found):
        say(f"`telltale report` will refuse it: {finding}")


def report(path: Path, html: Path | None) -> None:
    """Check that a report lacks nothing, and render it as a page.

    Raises:
        probes.errors.TelltaleError: it is no report, it lacks something, or the page cannot be written.
    """
    from probes.fit.evaluation.lint import read_report

    if html is not None and (missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]):
        raise EvaluateError(f"--html needs {' and '.join(missing)}, not installed here. Install the extra 'train'.")
    found = read_report(path)
    say(f"{path}: complete. Verdict: {found.verdict.grade.value}")
    if html is not None:
        from probes.fit.evaluation.html_report import render_page

        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(render_page(found), encoding="utf-8")
        say(f"wrote {html}")


def _rows_of_files(data: Path | None, train: Path | None) -> Rows:
    from probes.fit.evaluation.evaluation_rows import Rows
    from probes.fit.rows.example import without_duplicates
    from probes.fit.sources.jsonl import read_jsonl

    if data is None:
        raise EvaluateError("--data FILE says which rows to measure on.")
    return Rows(
        measured=without_duplicates(read_jsonl(data), seen=set()),
        file=data.name,
        train=None if train is None else without_duplicates(read_jsonl(train), seen=set()),
        train_file="" if train is None else train.name,
    )


def _rows_of_recipe(path: Path, row_set: str | None, cache: Path) -> Rows:
    """The recipe's development rows, or those of a set that it keeps apart, beside its training rows."""
    from probes.fit.evaluation.evaluation_rows import Rows
    from probes.fit.rows.dataset import build_dataset
    from probes.fit.rows.wheels import WheelStore
    from probes.fit.sources import SourceContext
    from probes.fit.training.recipe import read_recipe

    recipe = read_recipe(path)
    wheels = WheelStore(folder=cache / "wheels", progress=say)
    data = build_dataset(recipe, SourceContext(wheels=wheels, folder=path.parent, seed=recipe.seed))
    if row_set is not None and row_set not in data.apart:
        raise EvaluateError(f"--set is {row_set!r}: {path} has no such set. {did_you_mean(row_set, list(data.apart))}")
    return Rows(
        measured=[*data.pairs, *data.hard_benign] if row_set is None else data.apart[row_set],
        file=f"{path.name}: {row_set or 'development'}",
        train=data.train,
        train_file=f"{path.name}: training",
    )


def _stage_of(artifact: Artifact, word: str | None) -> Stage:
    if word is not None:
        return _word(Stage, word, "--stage")
    if not artifact.card.calibrations:
        raise EvaluateError(
            f"{artifact.path}: the card has no calibration, so nobody has said what the statistic is. Calibrate it "
            "first (telltale calibrate)."
        )
    return artifact.card.calibrations[0].stage


def _word(kind: type[Word], word: str, option: str) -> Word:
    known = [member.value for member in kind]
    if word not in known:
        raise EvaluateError(f"{option} is {word!r}. {did_you_mean(word, known)}")
    return kind(word)
