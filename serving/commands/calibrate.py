"""``telltale calibrate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from probes.aggregate import Aggregator, parse_aggregator
from probes.artifact import Artifact, save_artifact, write_card
from probes.card import Calibration, Format, LengthBucket, Stage
from probes.errors import TelltaleError, did_you_mean
from probes.threshold import ThresholdMethod
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say

if TYPE_CHECKING:
    from probes.fit.calibration.calibrate import Promise
    from probes.fit.rows.example import Example

Word = TypeVar("Word", bound=StrEnum)
_AUTO, _OFF = "auto", "off"
_CAUGHT = (0.9, 0.5)
"""Shares of the positive requests for which it is said what alarms are worth."""


class CalibrateError(TelltaleError, ValueError):
    """The command's options do not go together, or say nothing that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What the command line says; see its help."""

    benign: Path
    labelled: Path | None
    formats: Sequence[str]
    stage: str
    aggregate: str | None
    target_fpr: float | None
    total_fpr: float | None
    weights: str | None
    share: float
    confidence: float
    method: str
    buckets: str
    model: str | None
    out: Path | None


def calibrate(paths: Sequence[Path], options: CalibrateOptions) -> None:
    """Calibrate detectors on benign requests, write their cards, and say what may be promised.

    Raises:
        probes.errors.TelltaleError: an artifact, the requests, the model or an option is not usable.
    """
    from probes.cachedir import user_cache_dir
    from probes.fit.calibration.calibrator import Calibrator
    from probes.fit.reading.scores import open_reader
    from probes.modelref import read_model_ref

    artifacts = [Artifact.load(path) for path in paths]
    promises = _promises(len(artifacts), options)
    name = options.model or DEFAULT_MODEL
    stage = _word("--stage", options.stage, Stage)
    formats = tuple(_word("--format", text, Format) for text in options.formats)
    aggregate = _aggregate(options.aggregate)
    edges = _edges(options.buckets)
    benign = _rows(options.benign, label=0)
    labelled = _rows(options.labelled) if options.labelled is not None else []
    folder, cache = embedded_folder(name) or Path(name), user_cache_dir()
    model = read_model_ref(folder, model_id=name, dtype=artifacts[0].card.model.dtype)
    calibrator = Calibrator(
        reader=open_reader(artifacts, folder, model=model, cache_dir=cache, progress=say),
        cache_dir=cache,
        stage=stage,
        formats=formats,
        aggregate=aggregate,
        edges=edges,
    )
    found = calibrator.run(artifacts, promises, benign, labelled)
    for artifact, calibrations, promise in zip(artifacts, found, promises, strict=True):
        card = artifact.card.with_calibrations(calibrations)
        if options.out is None:
            write_card(artifact.path, card)
        else:
            save_artifact(options.out / artifact.path.name, card, artifact.tensors)
        _show(artifact.card.name, calibrations, promise)
        say(f"wrote the card of {(options.out or artifact.path.parent) / artifact.path.name}")


def _rows(path: Path, *, label: int | None = None) -> list[Example]:
    """The rows of a file, but for those that stand in public test sets."""
    from probes.fit.rows.example import without_dropped
    from probes.fit.sources.jsonl import read_jsonl

    rows = read_jsonl(path, label=label)
    kept = without_dropped(rows)
    if not kept:
        raise CalibrateError(
            f"{path}: there are no requests in it that may be used. Give a file with some, one a line."
        )
    if len(kept) < len(rows):
        say(f"{path}: {len(rows) - len(kept)} of {len(rows)} rows stand in public test sets and are left out")
    return kept


def _promises(count: int, options: CalibrateOptions) -> list[Promise]:
    """What each detector's threshold is to promise."""
    from probes.fit.calibration.calibrate import Promise, shares

    if options.total_fpr is None:
        if options.weights is not None:
            raise CalibrateError("--weights divides a total: give --total-fpr too, or leave it out.")
        targets = [(0.01 if options.target_fpr is None else options.target_fpr) * options.share] * count
    else:
        if options.target_fpr is not None or options.share != 1:
            raise CalibrateError("--total-fpr is divided among the detectors: leave --target-fpr and --share out.")
        weights = _numbers("--weights", options.weights) if options.weights is not None else [1.0] * count
        if len(weights) != count:
            raise CalibrateError(f"--weights has {len(weights)} numbers for {count} detectors. Give one for each.")
        targets = shares(options.total_fpr, weights)
    method = _word("--method", options.method, ThresholdMethod)
    return [Promise(target_fpr=target, confidence=options.confidence, method=method) for target in targets]


def _word(option: str, value: str, words: type[Word]) -> Word:
    known = [word.value for word in words]
    if value not in known:
        raise CalibrateError(f"{option} is {value!r}. {did_you_mean(value, known)}")
    return words(value)


def _aggregate(text: str | None) -> Aggregator | None:
    """Read ``ema,alpha=0.12``."""
    if text is None:
        return None
    kind, *parameters = text.split(",")
    fields: dict[str, object] = {"kind": kind}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals:
            raise CalibrateError(
                f"--aggregate is {text!r}: {parameter!r} is no NAME=VALUE. Write it as in ema,alpha=0.12."
            )
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:  # a word, such as the one in delta,of=last
            fields[key] = value
    try:
        return parse_aggregator(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or kind
        raise CalibrateError(f"--aggregate is {text!r}: {where}: {first['msg']}. Correct it.") from error


def _edges(text: str) -> tuple[int, ...] | None:
    if text == _AUTO:
        return None
    if text == _OFF:
        return ()
    numbers = _numbers("--buckets", text, allowed=f"{_AUTO}, {_OFF} or lengths such as 64,256")
    if any(number < 1 or number != int(number) for number in numbers) or sorted(set(numbers)) != numbers:
        raise CalibrateError(f"--buckets is {text!r}: lengths in tokens, whole and ascending, are read.")
    return tuple(int(number) for number in numbers)


def _numbers(option: str, text: str, allowed: str = "numbers with commas between them") -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise CalibrateError(f"{option} is {text!r}; {allowed} are read.") from error


def _show(name: str, calibrations: Sequence[Calibration], promise: Promise) -> None:
    """The thresholds of one detector, what they promise, and what their alarms are worth."""
    from probes.fit.calibration.calibrate import bound_of, shortfall

    console = Console()
    table = Table(title=f"{name}: thresholds by {promise.method.value}", title_justify="left")
    columns = ("format", "statistic", "tokens", "fires above", "benign", "asked", "at most", "certified")
    for column in columns:
        table.add_column(column, overflow="fold")
    for calibration in calibrations:
        parts: Sequence[Calibration | LengthBucket] = calibration.buckets or (calibration,)
        longest = 0
        for part in parts:
            table.add_row(
                calibration.format.value,
                f"{calibration.aggregate} at {calibration.stage.value}",
                _span(part, longest),
                f"{part.threshold:.4g}",
                str(part.num_benign),
                f"{calibration.target_fpr:.3g}",
                f"{bound_of(part, promise):.3g} ({calibration.confidence:.0%})",
                "yes" if part.certified else "no",
            )
            longest = (part.max_tokens or 0) if isinstance(part, LengthBucket) else 0
    console.print(table)
    for calibration in calibrations:
        if missing := shortfall(calibration):
            console.print(f"{calibration.format.value}: {missing}")
        if calibration.platt is not None:
            platt = calibration.platt
            console.print(
                f"{calibration.format.value}: probability 1 / (1 + exp(-({platt.slope:.4g} * statistic + "
                f"{platt.intercept:.4g}))); calibration error {platt.ece_before:.3f} before, {platt.ece_after:.3f} "
                f"after ({platt.num_positive} positive and {platt.num_negative} negative rows)"
            )
    _show_panel(console, promise)


def _show_panel(console: Console, promise: Promise) -> None:
    from probes.fit.evaluation.evaluate import base_rates

    table = Table(
        title=f"of 10,000 requests, if {promise.target_fpr:.3g} of the harmless ones fire", title_justify="left"
    )
    for column in ("positive", "of them caught", "alarms", "right alarms"):
        table.add_column(column)
    rows = [(tpr, row) for tpr in _CAUGHT for row in base_rates(tpr, promise.target_fpr)]
    for tpr, row in rows:
        table.add_row(f"{1e4 * row.prevalence:g}", f"{tpr:.0%}", f"{row.alarms:.1f}", f"{row.positive_value:.1%}")
    console.print(table)


def _span(part: Calibration | LengthBucket, longest: int) -> str:
    if not isinstance(part, LengthBucket):
        return "any"
    if part.max_tokens is None:
        return f"from {longest + 1}"
    return f"{longest + 1} to {part.max_tokens}"
