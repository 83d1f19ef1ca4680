"""Makes a detector from a recipe: rows, activations, search, fit, threshold, report, artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact, save_artifact
from probes.cachedir import user_cache_dir
from probes.card import Calibration, Card, Format, ModelRef
from probes.detectors import load_detector
from probes.fit.calibration.buckets import edges_where_it_grows
from probes.fit.calibration.calibrate import Promise, calibrate, shortfall
from probes.fit.evaluation.baselines import EmbeddingPeer, TextEncoder, TextPeer, TfIdfPeer, random_probes
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.model_controls import NUM_RANDOM, NUM_SHUFFLED
from probes.fit.evaluation.report import development, training_rows
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.stacked import StackedRows
from probes.fit.rows.apart import measure_apart
from probes.fit.rows.dataset import build_dataset, count_sources
from probes.fit.rows.example import data_digest
from probes.fit.rows.split import Fold, make_folds, make_source_folds
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext
from probes.fit.token_fitters import TokenProbe
from probes.fit.training.canary import make_canary
from probes.fit.training.ensemble import ensemble_tensors
from probes.fit.training.linear_probe import LinearProbe
from probes.fit.training.recipe import Buckets, LeaveOut, read_recipe
from probes.fit.training.search import Candidate, Choice, Probe, choose
from probes.fit.training.serving_aggregate import choose_served
from probes.fit.training.session import FitSession, statistics_of
from probes.modelref import read_model_ref
from probes.taps import Tap

__all__ = ["train"]

_SERVED_DTYPE = "float32"
_NORM_TEST_ROWS = 32
_TABLE_ROWS = 10


def train(
    recipe_path: Path,
    *,
    model_dir: Path,
    model_id: str,
    out: Path,
    progress: Callable[[str], None],
    cache_dir: Path | None = None,
    encoder: TextEncoder | None = None,
) -> Artifact:
    """Make the detector of a recipe for one model; the same recipe, model and libraries give the same detector.

    Args:
        recipe_path: YAML file.
        model_dir: folder of the model, in transformers' layout.
        model_id: its name for people, e.g. ``builtin:smollm2-135m-instruct``.
        out: folder for ``NAME.safetensors`` and ``NAME.card.json``.
        progress: told what is being done, one line each time.
        cache_dir: for wheels and activations, if not the user's own.
        encoder: of the second text-only peer, logistic regression on its vectors; None: TF-IDF is the only one.
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
        model_dir,
        model=model,
        layers=recipe.search.layers,
        site=recipe.search.site,
        cache_dir=cache,
        progress=progress,
    )
    formats = sorted({*recipe.training.formats, *recipe.calibration.formats})
    skip_first = max(reader.sink_positions(data.calibration[:_NORM_TEST_ROWS], f) for f in formats)
    session = FitSession(recipe=recipe, data=data, reader=reader, skip_first=skip_first, progress=progress)

    split = make_source_folds if recipe.search.leave_out is LeaveOut.SOURCE else make_folds
    folds = split(data.train, context.rng("folds"))
    trained_on = {f: session.read_means(data.train, f, "training rows") for f in recipe.training.formats}
    stacked = StackedRows(session, trained_on)
    found = _search(session, stacked, folds)
    features = stacked.features(found.candidate)
    probe = found.candidate.fit(features.values, stacked.labels)
    choice = choose_served(session, found, trained_on, folds)
    session = session.finish(choice.candidate)
    calibrations = tuple(_calibrate(session, probe, choice.candidate, f) for f in recipe.calibration.formats)
    progress("measuring on the development rows, beside the baselines")
    generator = np.random.default_rng(recipe.seed)
    controls: dict[Control, Sequence[Probe]] = {
        Control.SHUFFLED_LABELS: [
            found.candidate.fit(features.values, generator.permutation(stacked.labels)) for _ in range(NUM_SHUFFLED)
        ]
    }
    if isinstance(probe, LinearProbe):
        controls[Control.RANDOM_DIRECTION] = random_probes(probe, count=NUM_RANDOM, generator=generator)
    peers: list[TextPeer] = [TfIdfPeer(), *([EmbeddingPeer(encoder)] if encoder is not None else [])]
    trained = training_rows(session, choice, folds, recipe.training.formats, peers=peers)
    evaluation: dict[str, Any] = {"leave_one_source_out": trained.report}
    for calibration in calibrations:
        measured = development(
            session, probe, choice.candidate, calibration, controls=controls, trained=trained, peers=peers
        )
        evaluation[calibration.format.value] = measured | measure_apart(session, probe, calibration, peers=peers)
    layers = choice.candidate.layers
    kind, tensors = _stored(probe, len(layers))
    card = Card(
        name=recipe.name,
        kind=kind,
        description=recipe.description,
        model=model,
        taps=tuple(str(Tap(layer, recipe.search.site)) for layer in layers),
        formats=recipe.calibration.formats,
        skip_first=skip_first,
        tensors_digest="0" * 64,
        calibrations=calibrations,
        training=_training_record(session, model, choice),
        evaluation=evaluation,
        created_by=_created_by(),
    )
    path = out / f"{recipe.name}.safetensors"
    detector = load_detector(Artifact(path, card, tensors))
    canary = make_canary(detector, reader, skip_first=skip_first, dtype=model.dtype)
    return save_artifact(path, card.model_copy(update={"canary": canary}), tensors)


def _search(session: FitSession, stacked: StackedRows, folds: Sequence[Fold]) -> Choice:
    """Fit on all training formats at once, test on each."""
    count, copies = len(session.data.train), len(session.recipe.training.formats)
    repeated = [
        Fold(
            fold.name,
            tuple(i + count * other for other in range(copies) for i in fold.train),
            tuple(i + count * copy for i in fold.test),
        )
        for copy in range(copies)
        for fold in folds
    ]
    search = session.recipe.search
    return choose(
        stacked.features,
        stacked.labels,
        repeated,
        layers=search.layers,
        aggregates=search.aggregates,
        fitters=search.fitters,
        ensembles=search.ensembles,
        token_fitters=search.token_fitters,
        progress=session.progress,
    )


def _stored(probe: Probe, layers: int) -> tuple[str, dict[str, npt.NDArray[np.float32]]]:
    """Kind and tensors of the artifact."""
    if isinstance(probe, TokenProbe):
        return probe.kind, probe.tensors()
    return ("linear", probe.tensors()) if layers == 1 else ("ensemble", ensemble_tensors(probe, layers))


def _calibrate(session: FitSession, probe: Probe, candidate: Candidate, text_format: Format) -> Calibration:
    rows = session.data.calibration
    settings = session.recipe.calibration
    statistics = statistics_of(probe, session.read(rows, text_format, "calibration rows"), candidate)
    lengths: npt.NDArray[np.int64] | None = None
    edges: tuple[int, ...] = ()
    if settings.buckets is Buckets.AUTO:
        promise = Promise(target_fpr=settings.target_fpr, confidence=settings.confidence)
        lengths = session.lengths(rows, text_format)
        edges = edges_where_it_grows(statistics, lengths, stage=session.recipe.stage, needed=promise.needed)
        what = f"{len(edges) + 1} thresholds by length" if edges else "one threshold for all lengths"
        session.progress(f"{text_format.value}: {what}")
    calibration = calibrate(
        statistics,
        rows,
        stage=session.recipe.stage,
        text_format=text_format,
        aggregate=candidate.aggregate,
        target_fpr=settings.target_fpr,
        confidence=settings.confidence,
        lengths=lengths,
        edges=edges,
    )
    if missing := shortfall(calibration):
        session.progress(f"{text_format.value}: {missing}")
    return calibration


def _training_record(session: FitSession, model: ModelRef, choice: Choice) -> dict[str, Any]:
    data = session.data
    best = sorted(choice.table, key=lambda candidate: -choice.table[candidate])[:_TABLE_ROWS]
    return {
        "recipe": session.recipe.model_dump(mode="json"),
        "rows": {
            "train_positive": count_sources([example for example in data.train if example.label]),
            "train_negative": count_sources([example for example in data.train if not example.label]),
            "calibration": count_sources(data.calibration),
            "pairs": count_sources(data.pairs),
            "hard_benign": count_sources(data.hard_benign),
            **{name: count_sources(rows) for name, rows in data.apart.items()},
        },
        "data_digests": {
            **{name: data_digest(getattr(data, name)) for name in ("train", "calibration", "pairs", "hard_benign")},
            **{name: data_digest(rows) for name, rows in data.apart.items()},
        },
        "chosen": {
            "layer": _layers(choice.candidate),
            "aggregate": choice.candidate.aggregate.config(),
            "fitted_on": (choice.fitted_on or choice.candidate.aggregate).config(),
            "fitter": choice.candidate.fitter.config(),
            "depth": round((max(choice.candidate.layers) + 1) / model.num_layers, 3),
        },
        "search": [_setting(c, choice) for c in best],
        "layers": [_setting(c, choice) for c in _best_of_layers(choice)],
        "served": [[str(aggregate), round(score, 4)] for aggregate, score in choice.served.items()],
        "libraries": {name: metadata.version(name) for name in ("numpy", "scikit-learn", "torch", "transformers")},
    }


def _best_of_layers(choice: Choice) -> list[Candidate]:
    best: dict[int, Candidate] = {}
    for candidate, value in choice.table.items():
        if len(candidate.layers) > 1:
            continue
        layer = candidate.layers[0]
        if layer not in best or value > choice.table[best[layer]]:
            best[layer] = candidate
    return [best[layer] for layer in sorted(best)]


def _setting(candidate: Candidate, choice: Choice) -> list[Any]:
    return [_layers(candidate), str(candidate.aggregate), str(candidate.fitter), round(choice.table[candidate], 4)]


def _layers(candidate: Candidate) -> int | list[int]:
    """As a card says it: one layer, or those of an ensemble."""
    return candidate.layers[0] if len(candidate.layers) == 1 else list(candidate.layers)


def _created_by() -> str:
    try:
        return f"telltale {metadata.version('telltale')}"
    except metadata.PackageNotFoundError:
        return "telltale, from a source folder"
