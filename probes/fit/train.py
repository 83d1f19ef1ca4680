"""Makes a detector from a recipe: rows, activations, search, fit, threshold, report, artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator, parse_aggregator
from probes.artifact import Artifact, save_artifact
from probes.cachedir import user_cache_dir
from probes.card import Calibration, Card, Format, ModelRef, Stage
from probes.fit.activations import ActivationReader, Activations
from probes.fit.baselines import random_probes, shuffled_probes
from probes.fit.calibrate import calibrate, shortfall
from probes.fit.dataset import Dataset, build_dataset, count_sources
from probes.fit.evaluate import ControlProbes, TestSet, at_threshold, compare, labels_of, text_baseline_scores, verdict
from probes.fit.example import Example, data_digest
from probes.fit.linear import Candidate, Choice, LinearProbe, choose, fit_linear
from probes.fit.measure import measure
from probes.fit.recipe import Recipe, read_recipe
from probes.fit.sources import SourceContext
from probes.fit.split import Fold, length_matched_pairs, make_folds
from probes.fit.wheels import WheelStore
from probes.modelref import read_model_ref
from probes.taps import Tap

__all__ = ["train"]

Float64 = npt.NDArray[np.float64]

_SERVED_DTYPE = "float32"
_NORM_TEST_ROWS = 32
_NUM_SHUFFLED = 5
_NUM_RANDOM = 200
_TABLE_ROWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """What every step needs."""

    recipe: Recipe
    data: Dataset
    reader: ActivationReader
    skip_first: int
    progress: Callable[[str], None]

    def read(self, examples: Sequence[Example], text_format: Format, label: str) -> Activations:
        """Activations of some rows."""
        return self.reader.read(
            examples,
            text_format=text_format,
            windows=self.recipe.search.windows,
            skip_first=self.skip_first,
            label=label,
        )


def train(
    recipe_path: Path,
    *,
    model_dir: Path,
    model_id: str,
    out: Path,
    progress: Callable[[str], None],
    cache_dir: Path | None = None,
) -> Artifact:
    """Make the detector of a recipe for one model; the same recipe, model and libraries give the same detector.

    Args:
        recipe_path: YAML file.
        model_dir: folder of the model, in transformers' layout.
        model_id: its name for people, e.g. ``builtin:smollm2-135m-instruct``.
        out: folder for ``NAME.safetensors`` and ``NAME.card.json``.
        progress: told what is being done, one line each time.
        cache_dir: for wheels and activations, if not the user's own.
    Raises:
        TelltaleError: of the recipe, a set, the model or the calibration; the text says which.
    """
    recipe = read_recipe(recipe_path)
    cache = cache_dir or user_cache_dir()
    context = SourceContext(
        wheels=WheelStore(folder=cache / "wheels", progress=progress), folder=recipe_path.parent, seed=recipe.seed
    )
    model = read_model_ref(model_dir, model_id=model_id, dtype=_SERVED_DTYPE, cache_dir=cache)
    data = build_dataset(recipe, context)
    progress(
        f"{recipe.name}: {len(data.train)} training rows, {len(data.calibration)} benign rows for calibration, "
        f"{len(data.pairs) + len(data.hard_benign)} development rows"
    )
    reader = ActivationReader(
        model_dir, model=model, layers=recipe.search.layers, cache_dir=cache, progress=progress
    )
    formats = sorted({*recipe.training.formats, *recipe.calibration.formats})
    skip_first = max(reader.sink_positions(data.calibration[:_NORM_TEST_ROWS], f) for f in formats)
    setup = _Setup(recipe=recipe, data=data, reader=reader, skip_first=skip_first, progress=progress)

    folds = make_folds(data.train, context.rng("folds"))
    trained_on = {f: setup.read(data.train, f, "training rows") for f in recipe.training.formats}
    choice = _search(setup, trained_on, folds)
    features, labels = _stacked(data.train, trained_on, choice.candidate)
    probe = fit_linear(features, labels, inverse_penalty=choice.candidate.inverse_penalty)
    calibrations = tuple(_calibrate(setup, probe, choice.candidate, f) for f in recipe.calibration.formats)
    progress("measuring on the development rows, beside the baselines")
    generator = np.random.default_rng(recipe.seed)
    shuffled = shuffled_probes(
        features, labels, inverse_penalty=choice.candidate.inverse_penalty, count=_NUM_SHUFFLED, generator=generator
    )
    controls = {"shuffled": shuffled, "random": random_probes(probe, count=_NUM_RANDOM, generator=generator)}
    evaluation: dict[str, Any] = {"leave_one_source_out": _leave_one_out(setup, choice, folds)}
    for calibration in calibrations:
        evaluation[calibration.format.value] = _development(setup, probe, choice.candidate, calibration, controls)
    card = Card(
        name=recipe.name,
        kind="linear",
        description=recipe.description,
        model=model,
        taps=(str(Tap(choice.candidate.layer, recipe.search.site)),),
        formats=recipe.calibration.formats,
        skip_first=skip_first,
        tensors_digest="0" * 64,
        calibrations=calibrations,
        training=_training_record(setup, model, choice),
        evaluation=evaluation,
        created_by=_created_by(),
    )
    return save_artifact(out / f"{recipe.name}.safetensors", card, probe.tensors())


def _search(setup: _Setup, trained_on: dict[Format, Activations], folds: Sequence[Fold]) -> Choice:
    """Search over all training formats at once: the rows of each further format follow those of the first."""
    count, copies = len(setup.data.train), len(trained_on)
    repeated = [
        Fold(
            fold.name,
            tuple(i + count * copy for copy in range(copies) for i in fold.train),
            tuple(i + count * copy for copy in range(copies) for i in fold.test),
        )
        for fold in folds
    ]
    return choose(
        lambda layer, window: np.concatenate([read.at(layer, window) for read in trained_on.values()]),
        np.tile(labels_of(setup.data.train), copies),
        repeated,
        layers=setup.recipe.search.layers,
        windows=setup.recipe.search.windows,
        inverse_penalties=setup.recipe.search.inverse_penalties,
        progress=setup.progress,
    )


def _stacked(
    examples: Sequence[Example], trained_on: dict[Format, Activations], candidate: Candidate
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    parts = [read.at(candidate.layer, candidate.window) for read in trained_on.values()]
    return np.concatenate(parts), np.tile(labels_of(examples), len(parts))


def _statistics(probe: LinearProbe, read: Activations, candidate: Candidate) -> Float64:
    """The served statistic: the mean of the last scores; minus infinity where the window never fills."""
    scores = probe.score(read.at(candidate.layer, candidate.window))
    statistics: Float64 = np.where(read.is_full(candidate.window), scores, -np.inf)
    return statistics


def _aggregate(candidate: Candidate) -> Aggregator:
    if candidate.window == 1:
        return parse_aggregator({"kind": "last"})
    return parse_aggregator({"kind": "rolling", "window": candidate.window})


def _calibrate(setup: _Setup, probe: LinearProbe, candidate: Candidate, text_format: Format) -> Calibration:
    rows = setup.data.calibration
    read = setup.read(rows, text_format, "calibration rows")
    calibration = calibrate(
        _statistics(probe, read, candidate),
        rows,
        stage=Stage.PROMPT,
        text_format=text_format,
        aggregate=_aggregate(candidate),
        target_fpr=setup.recipe.calibration.target_fpr,
        confidence=setup.recipe.calibration.confidence,
    )
    if missing := shortfall(calibration):
        setup.progress(f"{text_format.value}: {missing}")
    return calibration


def _leave_one_out(setup: _Setup, choice: Choice, folds: Sequence[Fold]) -> dict[str, Any]:
    """Each source of positives held out in turn; layer, window and C were chosen on these same folds."""
    rows = setup.data.train
    report: dict[str, Any] = {}
    for fold, scores in zip(folds, choice.fold_scores, strict=True):
        tested = [rows[i] for i in fold.test]
        text_scores = text_baseline_scores([rows[i] for i in fold.train], tested)
        first_format = scores[: len(tested)]
        report[fold.name] = compare(
            TestSet(examples=tested, scores=first_format, text_scores=text_scores, controls=ControlProbes()),
            seed=setup.recipe.seed,
        )
    return report


def _development(
    setup: _Setup,
    probe: LinearProbe,
    candidate: Candidate,
    calibration: Calibration,
    controls: dict[str, list[LinearProbe]],
) -> dict[str, Any]:
    recipe, data = setup.recipe, setup.data
    rows = [*data.pairs, *data.hard_benign]
    if not rows:
        return {}
    read = setup.read(rows, calibration.format, "development rows")
    statistics = _statistics(probe, read, candidate)
    text_scores = text_baseline_scores(data.train, rows)
    place = {id(example): i for i, example in enumerate(rows)}
    drawn = {name: [_statistics(p, read, candidate) for p in probes] for name, probes in controls.items()}
    tolerance = recipe.development.length_tolerance
    harmful = [example for example in data.pairs if example.label]
    sets = {
        "pairs": data.pairs,
        "pairs_length_matched": length_matched_pairs(data.pairs, tolerance),
        "against_hard_benign_length_matched": length_matched_pairs([*harmful, *data.hard_benign], tolerance),
    }
    report: dict[str, Any] = {}
    for name, examples in sets.items():
        labels = labels_of(examples)
        if labels.size == 0 or labels.min() == labels.max():
            continue
        index = [place[id(example)] for example in examples]
        chosen = ControlProbes(
            shuffled=[scores[index] for scores in drawn["shuffled"]],
            random=[scores[index] for scores in drawn["random"]],
        )
        report[name] = compare(
            TestSet(examples=examples, scores=statistics[index], text_scores=text_scores[index], controls=chosen),
            seed=recipe.seed,
        )
    matched = [place[id(example)] for example in sets["pairs_length_matched"]]
    if matched:
        labels = labels_of(sets["pairs_length_matched"])
        report["verdict"] = verdict(
            measure(statistics[matched], labels, seed=recipe.seed),
            measure(text_scores[matched], labels, seed=recipe.seed),
        )
    named = {"pairs": len(data.pairs), "hard_benign": len(data.hard_benign)}
    ends = np.cumsum([0, *named.values()])
    labels = labels_of(rows)
    report["at_threshold"] = at_threshold(
        calibration,
        {
            name: (statistics[start:end], labels[start:end])
            for name, start, end in zip(named, ends[:-1], ends[1:], strict=True)
            if end > start
        },
    )
    return report


def _training_record(setup: _Setup, model: ModelRef, choice: Choice) -> dict[str, Any]:
    data = setup.data
    best = sorted(choice.table, key=lambda candidate: -choice.table[candidate])[:_TABLE_ROWS]
    return {
        "recipe": setup.recipe.model_dump(mode="json"),
        "rows": {
            "train_positive": count_sources([example for example in data.train if example.label]),
            "train_negative": count_sources([example for example in data.train if not example.label]),
            "calibration": count_sources(data.calibration),
            "pairs": count_sources(data.pairs),
            "hard_benign": count_sources(data.hard_benign),
        },
        "data_digests": {
            name: data_digest(getattr(data, name)) for name in ("train", "calibration", "pairs", "hard_benign")
        },
        "chosen": {
            "layer": choice.candidate.layer,
            "window": choice.candidate.window,
            "inverse_penalty": choice.candidate.inverse_penalty,
            "depth": round((choice.candidate.layer + 1) / model.num_layers, 3),
        },
        "search": [[c.layer, c.window, c.inverse_penalty, round(choice.table[c], 4)] for c in best],
        "libraries": {name: metadata.version(name) for name in ("numpy", "scikit-learn", "torch", "transformers")},
    }


def _created_by() -> str:
    try:
        return f"telltale {metadata.version('telltale')}"
    except metadata.PackageNotFoundError:
        return "telltale, from a source folder"
