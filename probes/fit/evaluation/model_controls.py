"""Probes that cannot know anything, on the served model and on one with random weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.card import Format, ModelRef
from probes.fit.evaluation.baselines import labels_of, random_probes, shuffled_probes
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.refit import Refit, Repeatable
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.random_init import random_model
from probes.fit.rows.example import Example
from probes.fit.training.linear_probe import LinearProbe

__all__ = ["NUM_RANDOM", "NUM_SHUFFLED", "knowing_nothing", "on_random_weights"]

Float64 = npt.NDArray[np.float64]

NUM_RANDOM = 200
NUM_SHUFFLED = 5
_MOST_ROWS = 2000
"""Training rows that a model with random weights reads, at most."""


def knowing_nothing(
    refit: Refit,
    probe: LinearProbe,
    reader: ActivationReader,
    measured: Sequence[Example],
    text_format: Format,
    *,
    train: Sequence[Example] | None,
    seed: int,
) -> dict[Control, Sequence[Float64]]:
    """Statistics of random directions, and of the fit on permuted labels where there are training rows.

    Args:
        refit: where is read, and how is fitted.
        probe: its mean and scale are the random directions' too.
        reader: of the served model.
        measured: rows to score.
        text_format: how they reach the model.
        train: to fit on; None: no shuffled labels.
        seed: of the draws.
    Returns: for each control, (measured,) of each draw.
    """
    generator = np.random.default_rng(seed)
    drawn = {Control.RANDOM_DIRECTION: random_probes(probe, count=NUM_RANDOM, generator=generator)}
    if train is not None:
        features = refit.features(reader, train, text_format, label="training rows")
        drawn[Control.SHUFFLED_LABELS] = shuffled_probes(
            features.means, labels_of(train), fitter=refit.whole_fitter, count=NUM_SHUFFLED, generator=generator
        )
    probes = [each for some in drawn.values() for each in some]
    found = refit.statistics(probes, reader, measured, text_format, label="measured rows, controls")
    ends = np.cumsum([len(some) for some in drawn.values()])[:-1]
    return {control: list(part) for control, part in zip(drawn, np.split(found, ends), strict=True)}


def on_random_weights(
    refit: Repeatable,
    measured: Sequence[Example],
    text_format: Format,
    *,
    train: Sequence[Example],
    model_dir: Path,
    model: ModelRef,
    cache_dir: Path,
    seed: int,
    progress: Callable[[str], None],
) -> Float64:
    """(measured,) statistics of the same fit on the same architecture with random weights.

    Args:
        refit: of the detector.
        measured: rows to score.
        text_format: how they reach the model.
        train: to fit on; of more than 2,000 as many are drawn.
        model_dir: folder of the served model.
        model: which model that is.
        cache_dir: where features are kept.
        seed: of the weights and the draw.
        progress: told how far it is.
    """
    rows = random.Random(seed).sample(list(train), _MOST_ROWS) if len(train) > _MOST_ROWS else train  # noqa: S311
    layers = [tap.layer for tap in refit.taps]
    with random_model(
        model_dir,
        model=model,
        depth=max(layers) + 1,
        seed=seed,
        folder=cache_dir / "random-init",
        head=refit.reads_head,
    ) as made:
        reader = ActivationReader(
            made.path,
            model=made.model,
            layers=layers,
            site=refit.taps[0].site,
            cache_dir=cache_dir,
            progress=progress,
        )
        return refit.on_model(reader, made.path, rows, measured, text_format, label="random weights")
