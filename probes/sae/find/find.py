"""Find the latents that tell a labelled set apart: selected on one half, measured on the other, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.card import Format
from probes.fit.evaluation.measure import Estimate, Measurer, auroc
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import ActivationSource
from probes.fit.rows.example import Example, data_digest
from probes.sae.describe.codes import SINK_FACTOR, read_codes
from probes.sae.describe.random_directions import draw_random_directions
from probes.sae.describe.reading import open_sae_reader, read_requests
from probes.sae.file import SaeFile
from probes.sae.find.halves import split_halves
from probes.sae.find.probes import LatentProbe, fit_latents, fit_raw
from probes.sae.find.separation import separate
from probes.sae.find.table import Counts, Figure, FoundLatent, Interval, SparseProbe, Table
from probes.taps import Tap

__all__ = ["Finding", "find"]

_SAMPLE_REQUESTS = 64
"""Requests by which the random directions' thresholds are set."""
_SHUFFLES = 50

Bools = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How latents are looked for.

    Attributes:
        model_dir: folder of the SAE's model, in transformers' layout.
        model_id: what people call it.
        progress: told what is being done.
        text_format: how the set reaches the model.
        sizes: numbers of latents of the k-sparse probes.
        told: how many single latents are told by each statistic, the best first.
        permutations: of the labels.
        seed: of every draw.
    """

    model_dir: Path
    model_id: str
    progress: Callable[[str], None]
    text_format: Format = Format.CHAT
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    told: int = 5
    permutations: int = 1000
    seed: int = 0


def find(file: SaeFile, rows: Sequence[Example], how: Finding) -> Table:
    """Read the set once; what is selected or fitted sees one half of it, what is measured is the other.

    Args:
        file: of the SAE.
        rows: labels 0 and 1; where rows have a response, it is what is read.
        how: all else.
    Raises:
        probes.artifact.ArtifactError: the SAE belongs to another model.
        probes.sae.find.halves.FindError: too few rows.
        probes.fit.reading.rendered.RenderError: a row has nothing to read.
    """
    halves = split_halves(rows, seed=how.seed)
    reader = open_sae_reader(file, how.model_dir, model_id=how.model_id, progress=how.progress)
    requests = read_requests(reader, rows, how.text_format)
    sae, skip_first = file.sae(), file.card.skip_first
    sample = _sample(reader, requests[:: max(len(requests) // _SAMPLE_REQUESTS, 1)], sae.tap, skip_first)
    directions = draw_random_directions(sae.tap, sample, (sae.encode(sample) > 0).mean(axis=0), seed=how.seed)
    source = _MeanSource(reader, sae.tap, requests, skip_first=skip_first, d_model=sae.d_model)
    own, random = read_codes([sae, directions], source, requests, skip_first=skip_first, label="set")
    how.progress(f"selecting among {sae.width} latents")

    judge = _Judge(rows, halves.measured, how)
    raw = fit_raw(source.means[judge.selected], *judge.selection).score(source.means)
    figures = [judge.figure("raw activations, logistic regression", raw)]
    means, control_means = own.means(), random.means()
    probes = []
    for size in (size for size in how.sizes if size <= sae.width):
        probe = fit_latents(means[judge.selected], *judge.selection, size)
        probes.append(_sparse(probe))
        control = fit_latents(control_means[judge.selected], *judge.selection, size)
        figures += [
            judge.figure(f"{size} latents, logistic regression", probe.score(means), raw=raw),
            judge.figure(f"{size} random directions, likewise", control.score(control_means), raw=raw),
        ]
    told: list[FoundLatent] = []
    for statistic, features in (("max", own.maxima()), ("mean", means)):
        found = separate(features[judge.selected], judge.selection[0], permutations=how.permutations, seed=how.seed)
        best = found.best(how.told)
        figures.append(judge.figure(f"best single latent, by its {statistic}", features[:, best[0]], raw=raw))
        told += [
            FoundLatent(
                latent=int(latent),
                statistic=statistic,
                selected_on=float(found.auroc[latent]),
                p=float(found.p[latent]),
                measured=judge.measured(features[:, latent]),
            )
            for latent in best
        ]
    controls = random.maxima()
    chosen = separate(controls[judge.selected], judge.selection[0], permutations=1, seed=how.seed).best(1)[0]
    figures.append(judge.figure("best single random direction, by its max", controls[:, chosen], raw=raw))
    figures.append(judge.shuffled("best single latent, labels shuffled first", own.maxima()))
    return Table(
        sae=file.card.name,
        tensors_digest=file.card.tensors_digest,
        data_digest=data_digest(rows),
        selected_on=judge.counts(judge.selected),
        measured_on=judge.counts(halves.measured),
        by_group=halves.by_group,
        figures=tuple(figures),
        latents=tuple(told),
        sparse_probes=tuple(probes),
    )


class _MeanSource:
    """Hands activations on, and keeps each request's mean for the raw probe: the model runs once for both.

    Attributes:
        means: (requests, d_model) float32.
    """

    def __init__(
        self, source: ActivationSource, tap: Tap, requests: Sequence[Rendered], *, skip_first: int, d_model: int
    ) -> None:
        self._source = source
        self._tap = tap
        self._positions = [request.positions(skip_first) for request in requests]
        self.means = np.zeros((len(requests), d_model), dtype=np.float32)

    def sweep(
        self, requests: Sequence[Rendered], taps: Sequence[Tap], *, label: str
    ) -> Iterator[tuple[int, Mapping[Tap, Float32]]]:
        """See ``ActivationSource``."""
        for number, found in self._source.sweep(requests, taps, label=label):
            if len(self._positions[number]):
                rows = found[self._tap][self._positions[number]]
                self.means[number] = rows.mean(axis=0, dtype=np.float64)
            yield number, found


class _Judge:
    """Figures of scores on the half that was left out."""

    def __init__(self, rows: Sequence[Example], measured: Bools, how: Finding) -> None:
        self._labels = np.array([row.label for row in rows], dtype=np.int64)
        self._groups = np.array([row.group for row in rows], dtype=np.str_)
        self._held = measured
        self._seed = how.seed
        self.selected = ~measured
        self._measurer = Measurer(self._labels[measured], self._groups[measured].tolist(), seed=how.seed)

    @property
    def selection(self) -> tuple[Int64, list[str]]:
        """Labels and groups of the half that is selected on."""
        return self._labels[self.selected], self._groups[self.selected].tolist()

    def counts(self, half: Bools) -> Counts:
        positives = int(self._labels[half].sum())
        groups = len(np.unique(self._groups[half]))
        return Counts(positives=positives, negatives=int(half.sum()) - positives, groups=groups)

    def measured(self, scores: Float64 | Float32) -> Interval:
        held = scores[self._held].astype(np.float64)
        return _interval(Estimate.of(auroc(held, self._labels[self._held]), self._measurer.areas(held)))

    def figure(self, name: str, scores: Float64 | Float32, *, raw: Float64 | None = None) -> Figure:
        wide = scores.astype(np.float64)
        minus = None if raw is None else self._measurer.difference(wide[self._held], raw[self._held])
        return Figure(
            name=name,
            selected_on=auroc(wide[self.selected], self._labels[self.selected]),
            measured=self.measured(wide),
            minus_raw=None if minus is None else _interval(minus),
        )

    def shuffled(self, name: str, features: Float32) -> Figure:
        """The best latent for shuffled labels, measured with the true ones: many draws, as one says little."""
        generator = np.random.default_rng(self._seed)
        areas = []
        for _ in range(_SHUFFLES):
            labels = generator.permutation(self._labels[self.selected])
            chosen = separate(features[self.selected], labels, permutations=1, seed=0).best(1)[0]
            areas.append(auroc(features[self._held, chosen].astype(np.float64), self._labels[self._held]))
        found = Estimate.of(float(np.median(areas)), np.array(areas))
        return Figure(name=name, selected_on=None, measured=_interval(found), minus_raw=None)


def _sample(source: ActivationSource, requests: Sequence[Rendered], tap: Tap, skip_first: int) -> Float32:
    parts = [
        found[tap][requests[number].positions(skip_first)].copy()
        for number, found in source.sweep(requests, [tap], label="sample")
    ]
    rows = np.concatenate(parts)
    norms = np.linalg.norm(rows, axis=1)
    kept: Float32 = rows[norms <= SINK_FACTOR * np.median(norms)]
    return kept


def _interval(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)


def _sparse(found: LatentProbe) -> SparseProbe:
    return SparseProbe(
        latents=tuple(int(latent) for latent in found.latents),
        weights=tuple(float(weight) for weight in found.probe.weight),
        bias=found.probe.constant,
    )
