"""The training loop: rows in, an autoencoder with its thresholds out. It can be killed at any moment and goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from probes.errors import TelltaleError
from probes.sae.train.autoencoder import Autoencoder
from probes.sae.train.checkpoint import Checkpoint
from probes.sae.train.dead import DeadLatents
from probes.sae.train.objective import Objective
from probes.sae.train.rows import RowPool
from probes.sae.train.scaling import Scaling
from probes.sae.train.settings import TrainingSettings

__all__ = ["StepFigures", "Trained", "TrainerError", "train_autoencoder"]

_SCALING_ROWS = 65_536
_MAX_GRADIENT = 1.0
_SAVE_SECONDS = 30.0


class TrainerError(TelltaleError, ValueError):
    """Rows and settings do not fit each other."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Of one step's batch.

    Attributes:
        step: that was done, from 1.
        steps: in all.
        fvu: share of the variance that is left unexplained.
        l0: active latents per row.
        dead: share of the latents that count as dead.
    """

    step: int
    steps: int
    fvu: float
    l0: float
    dead: float


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What came out, in normalised coordinates.

    Attributes:
        model: the autoencoder.
        thresholds: (width,) float32.
        scaling: into these coordinates.
        steps: that were done.
    """

    model: Autoencoder
    thresholds: torch.Tensor
    scaling: Scaling
    steps: int


@dataclass(frozen=True, slots=True)
class _Step:
    fvu: float
    l0: float


class _Run(torch.nn.Module):
    """All that is trained or counted, so that a checkpoint holds it whole."""

    def __init__(self, settings: TrainingSettings, d_model: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(settings.seed)
        self.autoencoder = Autoencoder(d_model, settings.width, generator)
        self.objective: Objective = settings.activation.make(settings.width)
        self.dead = DeadLatents(settings.width, after=settings.dead_after, most=max(d_model // 2, 1))


def train_autoencoder(
    rows: RowPool,
    settings: TrainingSettings,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[StepFigures], None] | None = None,
) -> Trained:
    """Minimise the unexplained share of the variance, sparsely.

    Args:
        rows: without sinks.
        settings: how.
        checkpoint: file that the state is kept in; where it exists, the training goes on from there. The order of the
            rows depends on the seed alone, so the result is that of a training that was not interrupted, up to the
            rounding of sums.
        on_step: told after each step.
    Raises:
        TrainerError: fewer rows than a batch has.
        probes.sae.train.scaling.ScalingError: the rows cannot be normalised.
        probes.sae.train.checkpoint.CheckpointError: the checkpoint is damaged or of another training.
    """
    per_epoch = len(rows) // settings.batch_rows
    if not per_epoch:
        raise TrainerError(
            f"{len(rows)} rows are fewer than the {settings.batch_rows} of a batch. Use more texts, or a smaller "
            "'batch_rows'."
        )
    steps = per_epoch * settings.epochs
    scaling = Scaling.of(rows.sample(_SCALING_ROWS, settings.seed))
    run = _Run(settings, rows.d_model)
    optimizer = torch.optim.Adam(run.parameters(), lr=settings.rate, fused=True)
    kept = None if checkpoint is None else Checkpoint(checkpoint, _digest(settings, scaling, len(rows)))
    done = kept.restore(run, optimizer) if kept else 0
    saved = time.monotonic()
    order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for step in range(done, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or not len(order):
            order = np.random.default_rng((settings.seed, epoch)).permutation(len(rows))
        index = np.sort(order[place * settings.batch_rows : (place + 1) * settings.batch_rows])
        batch = torch.from_numpy(scaling.apply(rows.take(index)))
        if step == 0:
            with torch.no_grad():
                run.objective.begin(run.autoencoder.pre_activations(batch))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * settings.factor((step + 1) / steps)
        found = _step(run, optimizer, batch, settings.aux_weight, (step + 1) / steps)
        if kept and (time.monotonic() - saved > _SAVE_SECONDS or step + 1 == steps):
            kept.save(step + 1, run, optimizer)
            saved = time.monotonic()
        if on_step:
            on_step(StepFigures(step + 1, steps, found.fvu, found.l0, run.dead.mask.float().mean().item()))
    return Trained(run.autoencoder, run.objective.thresholds(settings.width), scaling, steps)


def _step(
    run: _Run, optimizer: torch.optim.Optimizer, batch: torch.Tensor, aux_weight: float, progress: float
) -> _Step:
    model = run.autoencoder
    optimizer.zero_grad()
    pre_activations = model.pre_activations(batch)
    coded = run.objective.code(pre_activations, progress)
    residual = batch - model.decode(coded.codes)
    fvu = residual.square().sum() / batch.numel()
    loss = fvu + coded.penalty
    if aux_weight:
        loss = loss + aux_weight * run.dead.loss(model, pre_activations, residual)
    loss.backward()  # type: ignore[no-untyped-call]
    model.keep_gradient_tangent()
    torch.nn.utils.clip_grad_norm_(run.parameters(), _MAX_GRADIENT)
    optimizer.step()
    model.normalise_decoder()
    run.dead.count(coded.codes)
    return _Step(fvu.item(), torch.count_nonzero(coded.codes).item() / len(batch))


def _digest(settings: TrainingSettings, scaling: Scaling, count: int) -> str:
    """The rows are told apart by their number, mean and spread."""
    digest = hashlib.sha256(settings.model_dump_json().encode())
    digest.update(f"/{count}/{scaling.factor!r}/".encode())
    digest.update(scaling.mean.tobytes())
    return digest.hexdigest()
