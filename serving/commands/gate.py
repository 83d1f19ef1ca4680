"""``telltale gate``: does a detector still hold on a new build of its model, and what to do if not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import serving
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say

if TYPE_CHECKING:
    from probes.artifact import Artifact
    from probes.card import ModelRef
    from probes.fit.reading.activations import ActivationReader
    from probes.fit.staleness.check import CheckReport
    from probes.fit.staleness.rows import BuildReader

Word = TypeVar("Word", bound=StrEnum)

gate_app = typer.Typer(
    help="Check a detector on a new build of its model, and repair it.", no_args_is_help=True, rich_markup_mode=None
)
_Detector = Annotated[Path, typer.Argument(help="The .safetensors file of a detector.", show_default=False)]
_Data = Annotated[
    Path,
    typer.Option(help='Requests, JSON lines: {"text": ..., "label": 0 or 1, "group": ...}.', show_default=False),
]
_Model = Annotated[str, typer.Option(help="The new build: a folder.", show_default=False)]
_Activations = Annotated[
    Path | None,
    typer.Option(help="In its place a folder that `telltale collect DATA --positions all` wrote: by the engine."),
]
_Out = Annotated[Path, typer.Option(help="Folder for the new artifact.", show_default=False)]
_Dtype = Annotated[str | None, typer.Option(help="What the new build is served in; the card's if left out.")]


@gate_app.command()
def record(
    artifact: _Detector,
    *,
    data: _Data,
    out: Annotated[Path, typer.Option(help="The reference, a JSON file.", show_default=False)],
    text_format: Annotated[str, typer.Option("--format", help="What the texts are: chat or raw.")] = "chat",
    stage: Annotated[str, typer.Option(help="prompt, stream or response.")] = "prompt",
    aggregate: Annotated[
        str | None, typer.Option(help="Which calibration, where there are several: ema,alpha=0.16.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model on the card.")] = DEFAULT_MODEL,
    activations: _Activations = None,
) -> None:
    """Write down what a detector says of some requests on the model of its card."""
    from probes.artifact import Artifact
    from probes.card import Format, Stage
    from probes.fit.staleness.check import record as run
    from probes.fit.staleness.decision import Margins, Verdict, decide
    from probes.fit.staleness.rows import read_rows

    loaded = Artifact.load(artifact)
    if activations is None:
        build = _Build.computed(loaded, model, loaded.card.model.dtype)
    else:
        build = _Build.collected(activations, data)
    loaded.require_model(build.model)
    reference = run(
        loaded,
        read_rows(data),
        build.reader,
        stage=_word(Stage, stage, "--stage"),
        text_format=_word(Format, text_format, "--format"),
        aggregate=aggregate,
        read_by=build.read_by,
        created_by=f"telltale {serving.__version__}",
    )
    reference.write(out)
    say(f"wrote {out}: {len(reference.statistics)} requests")
    unchanged = decide(reference.quality, reference.claim, Margins())
    for line in unchanged.reasons:
        typer.echo(line)
    if not reference.certified:
        say("the calibration does not certify its promise, so a check cannot either")
    if unchanged.verdict is not Verdict.PASS:
        say(f"on these rows even an unchanged build would be {unchanged.verdict.value}")
        for line in unchanged.needs:
            say(line)


@gate_app.command()
def check(
    artifact: _Detector,
    *,
    reference: Annotated[Path, typer.Option(help="What `gate record` wrote.", show_default=False)],
    data: _Data,
    model: Annotated[str | None, typer.Option(help="The new build: a folder.")] = None,
    dtype: _Dtype = None,
    activations: _Activations = None,
    margin: Annotated[float, typer.Option(help="AUROC that may be lost.")] = 0.02,
    tpr_margin: Annotated[float, typer.Option(help="True-positive rate at the threshold that may be lost.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the report.")] = None,
) -> None:
    """Score the recorded requests on a new build: PASS (exit 0), STALE (10), DEGRADED (11) or INCONCLUSIVE (12)."""
    from probes.artifact import Artifact
    from probes.fit.staleness.check import check as run
    from probes.fit.staleness.decision import Margins
    from probes.fit.staleness.reference import Reference
    from probes.fit.staleness.rows import read_rows

    if not (0 < margin < 0.5 and 0 < tpr_margin < 1):  # noqa: PLR2004 - half of AUROC is chance
        raise typer.BadParameter("--margin lies between 0 and 0.5, --tpr-margin between 0 and 1")
    if (model is None) == (activations is None):
        raise typer.BadParameter("--model or --activations, one of them, says which build is checked")
    loaded, rows = Artifact.load(artifact), read_rows(data)
    recorded = Reference.read(reference)
    recorded.require(loaded, rows)
    if activations is not None:
        build = _Build.collected(activations, data)
    else:
        build = _Build.computed(loaded, model or "", dtype or loaded.card.model.dtype)
    report = run(
        loaded,
        recorded,
        rows,
        build.reader,
        model=build.model,
        margins=Margins(auroc=margin, tpr=tpr_margin),
        read_by=build.read_by,
        created_by=f"telltale {serving.__version__}",
    )
    if out is not None:
        report.write(out)
    for line in _lines(report):
        typer.echo(line)
    if out is not None:
        say(f"wrote {out}")
    raise typer.Exit(report.decision.exit_code)


@gate_app.command()
def adopt(
    artifact: _Detector,
    *,
    report: Annotated[list[Path], typer.Option(help="What `gate check --out` wrote; once for each format.")],
    out: _Out,
) -> None:
    """Bind a detector to the build on which it was checked: after PASS with its threshold, after STALE without."""
    from probes.artifact import Artifact
    from probes.fit.staleness.adopt import adopt as run
    from probes.fit.staleness.check import CheckReport

    loaded = Artifact.load(artifact)
    reports = [CheckReport.read(path) for path in report]
    made = run(loaded, reports, created_by=f"telltale {serving.__version__}")
    _save(loaded, made, out)


@gate_app.command()
def repair(
    artifact: _Detector,
    *,
    model: _Model,
    data: Annotated[Path, typer.Option(help="Some hundred texts, JSON lines; no labels.", show_default=False)],
    out: _Out,
    old: Annotated[str, typer.Option(help="The model on the card.")] = DEFAULT_MODEL,
    dtype: _Dtype = None,
    floor: Annotated[float, typer.Option(min=0, max=1, help="Least R^2 of the score on held-out texts.")] = 0.8,
) -> None:
    """Carry a detector over to a new build by a linear map from its activations to the old ones."""
    from probes.artifact import Artifact
    from probes.fit.realign.repair import repair as run
    from probes.fit.staleness.rows import read_rows

    loaded, rows = Artifact.load(artifact), read_rows(data)
    repaired = run(
        loaded,
        rows.examples,
        old=_reader(loaded, old, loaded.card.model.dtype),
        new=_reader(loaded, model, dtype or loaded.card.model.dtype),
        data_digest=rows.digest(),
        floor=floor,
        created_by=f"telltale {serving.__version__}",
        progress=say,
    )
    _save(loaded, repaired.artifact, out)


def _word(kind: type[Word], word: str, option: str) -> Word:
    known = [member.value for member in kind]
    if word not in known:
        raise typer.BadParameter(f"{option} is {word!r}; it is one of {', '.join(known)}")
    return kind(word)


@dataclass(frozen=True, slots=True)
class _Build:
    """A build, and what reads it."""

    reader: BuildReader
    model: ModelRef
    read_by: str

    @classmethod
    def computed(cls, artifact: Artifact, name: str, dtype: str) -> _Build:
        """By transformers."""
        from importlib import metadata

        reader = _reader(artifact, name, dtype)
        return cls(reader, reader.model, f"transformers {metadata.version('transformers')}, float32")

    @classmethod
    def collected(cls, folder: Path, data: Path) -> _Build:
        """By the serving engine."""
        from probes.fit.staleness.collected import CollectedBuild

        found = CollectedBuild(folder, data)
        return cls(found, found.model, found.read_by)


def _reader(artifact: Artifact, name: str, dtype: str) -> ActivationReader:
    """A reader of a build as far up as the detector reads."""
    from probes.cachedir import user_cache_dir
    from probes.fit.reading.activations import ActivationReader
    from probes.fit.staleness.check import require_readable
    from probes.modelref import read_model_ref

    folder = embedded_folder(name) or Path(name)
    model = read_model_ref(folder, model_id=name, dtype=dtype)
    require_readable(artifact, model)
    return ActivationReader(
        folder,
        model=model,
        layers=sorted({tap.layer for tap in artifact.taps}),
        cache_dir=user_cache_dir(),
        progress=say,
    )


def _save(old: Artifact, made: Artifact, out: Path) -> None:
    from probes.fit.staleness.reference import as_option
    from probes.fit.staleness.rows import StalenessError

    path = out / old.path.name
    if path.resolve() == old.path.resolve():
        raise StalenessError(f"--out {out} is where the old artifact lies; the new one goes into another folder.")
    saved = made.save(path)
    say(f"wrote {path}, for {saved.card.model.id!r}")
    model = saved.card.model.id
    kept = {(item.stage, item.format, item.aggregate) for item in saved.card.calibrations}
    for item in old.card.calibrations:
        if (item.stage, item.format, item.aggregate) not in kept:
            say(
                f"no threshold at {item.stage.value} in {item.format.value} yet: telltale calibrate {path} --benign "
                f"FILE.jsonl --stage {item.stage.value} --format {item.format.value} --aggregate "
                f"{as_option(item.aggregate)} --target-fpr {item.target_fpr:g} --model {model}"
            )
    say(f"it has no canary yet: telltale canary {path} --model {model}")


def _lines(report: CheckReport) -> Iterator[str]:
    yield f"{report.decision.verdict.value}: {report.detector} on {report.model_after.id}"
    yield from report.decision.reasons
    yield from report.decision.needs
    agreement = report.comparison.agreement
    if agreement.rank_correlation is not None and agreement.largest_shift is not None:
        yield (
            f"Scores: rank correlation {agreement.rank_correlation:.4f}, mean shift {agreement.mean_shift:+.3f} and "
            f"largest {agreement.largest_shift:.3f} standard deviations; {agreement.identical} of {agreement.num} are "
            "the very same."
        )
    for change in report.changes:
        yield f"Changed: {change.what}, {_short(change.before)} to {_short(change.after)}."
    if not report.changes:
        yield "Changed: nothing in weights, tokenizer, chat template and dtype."
    if report.tokens_changed:
        yield f"{report.tokens_changed} of {report.comparison.num} requests reach the model as other tokens."
    for change in report.library_changes:
        yield f"Library: {change.what} {_version(change.before)} to {_version(change.after)}."


def _short(value: str | None) -> str:
    return f"{value[:12]}..." if value is not None and len(value) == 64 else str(value)  # noqa: PLR2004 - a digest


def _version(value: str | None) -> str:
    return "not there" if value is None else value
