"""Training sparse autoencoders: a planted dictionary is found again, and a killed training loses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from probes.sae.train.autoencoder import Autoencoder
from probes.sae.train.batch_topk import BatchTopK
from probes.sae.train.checkpoint import CheckpointError
from probes.sae.train.dead import DeadLatents
from probes.sae.train.jump_relu import JumpReLU
from probes.sae.train.objective import smallest_kept
from probes.sae.train.rows import RowPool, RowsError
from probes.sae.train.scaling import Scaling, ScalingError
from probes.sae.train.settings import TrainingSettings
from probes.sae.train.trainer import StepFigures, Trained, TrainerError, train_autoencoder

FEATURES, D_MODEL, ACTIVE = 64, 32, 2
ACTIVATIONS = ({"kind": "batchtopk", "k": ACTIVE}, {"kind": "jumprelu", "l0": float(ACTIVE)})


class Killed(Exception):
    pass


def planted(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary of unit directions (features, d_model), and sparse combinations of them around a mean."""
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((FEATURES, D_MODEL))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    return dictionary, combined(dictionary, rows, seed=seed + 1)


def combined(dictionary: np.ndarray, rows: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    active = rng.random((rows, FEATURES)) < ACTIVE / FEATURES
    codes = np.where(active, rng.uniform(0.5, 1.5, active.shape), 0.0)
    return (7.0 * (codes @ dictionary) + 3.0).astype(np.float32)


def settings(activation: dict[str, object], **changes: object) -> TrainingSettings:
    fields = {
        "width": FEATURES,
        "activation": activation,
        "epochs": 20,
        "batch_rows": 512,
        "learning_rate": 3e-3,
        "dead_after": 5000,
        "seed": 1,
    }
    return TrainingSettings.model_validate(fields | changes)


def similarity(dictionary: np.ndarray, trained: Trained) -> float:
    """Mean over the planted features of the largest cosine with a decoder row."""
    found = trained.model.decoder.detach().numpy()
    return float((dictionary @ found.T).max(axis=1).mean())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: str(activation["kind"]))
def test_a_planted_dictionary_is_found_again(activation: dict[str, object]) -> None:
    dictionary, rows = planted(40_000)
    figures: list[StepFigures] = []
    trained = train_autoencoder(RowPool([rows]), settings(activation), on_step=figures.append)
    assert similarity(dictionary, trained) >= 0.95
    random = train_autoencoder(RowPool([rows[:512]]), settings(activation, epochs=1))
    assert similarity(dictionary, random) < 0.7, "the start alone must not pass"
    assert figures[0].fvu > 0.5
    assert figures[-1].fvu < 0.15
    np.testing.assert_allclose(trained.model.decoder.detach().norm(dim=1).numpy(), 1.0, atol=1e-5)

    # What is served: the thresholds alone, on rows that it was not trained on, all at once or one by one.
    unseen = combined(dictionary, 4000, seed=9)
    pre = trained.model.pre_activations(torch.from_numpy(trained.scaling.apply(unseen))).detach()
    active = (pre > trained.thresholds).float()
    assert active.sum(dim=1).mean().item() == pytest.approx(ACTIVE, rel=0.25)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: str(activation["kind"]))
def test_a_killed_training_goes_on_where_it_was(
    activation: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed twice: behind a step whose state was saved, and behind one whose state was lost."""
    monkeypatch.setattr("probes.sae.train.trainer._SAVE_SECONDS", 0.0)
    rows = RowPool([planted(3000)[1]])
    chosen = settings(activation, epochs=6, dead_after=600)
    whole = train_autoencoder(rows, chosen)
    path = tmp_path / "state.safetensors"
    steps: list[int] = []

    def kill(figures: StepFigures) -> None:
        steps.append(figures.step)
        if len(steps) in {7, 16}:
            raise Killed

    with pytest.raises(Killed):
        train_autoencoder(rows, chosen, checkpoint=path, on_step=kill)
    kept = path.read_bytes()
    with pytest.raises(Killed):
        train_autoencoder(rows, chosen, checkpoint=path, on_step=kill)
    path.write_bytes(kept)
    resumed = train_autoencoder(rows, chosen, checkpoint=path, on_step=kill)
    assert steps == [*range(1, 8), *range(8, 17), *range(8, 31)]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resumed.thresholds, whole.thresholds, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_other_settings_or_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    rows = RowPool([planted(600)[1]])
    train_autoencoder(rows, settings(ACTIVATIONS[0], epochs=1), checkpoint=path)
    with pytest.raises(CheckpointError, match="other rows or settings"):
        train_autoencoder(rows, settings(ACTIVATIONS[0], epochs=2), checkpoint=path)
    with pytest.raises(CheckpointError, match="other rows or settings"):
        train_autoencoder(RowPool([planted(600, seed=2)[1]]), settings(ACTIVATIONS[0], epochs=1), checkpoint=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train_autoencoder(rows, settings(ACTIVATIONS[0], epochs=1), checkpoint=path)


def test_batch_topk_keeps_the_largest_of_the_whole_batch() -> None:
    values = torch.tensor([[5.0, 4.0, 3.0], [0.5, -9.0, 0.1]])
    objective = BatchTopK(1)
    codes = objective.code(values, 1.0).codes
    assert codes.tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert objective.thresholds(3).tolist() == [4.0] * 3
    for _ in range(20):
        objective.code(values + 1, 1.0)
    assert objective.thresholds(3)[0].item() == pytest.approx(5 - 0.99**20)


def test_the_smallest_kept_value_is_that_of_a_sort() -> None:
    values = torch.rand((7, 11), generator=torch.Generator().manual_seed(0))
    ordered = values.flatten().sort(descending=True).values
    for kept in (1, 5, 76):
        assert smallest_kept(values, kept) == pytest.approx(ordered[kept - 1].item())
    assert smallest_kept(values, 77) == 0.0


def test_jump_relu_gives_the_thresholds_the_stated_gradients() -> None:
    """By the formulas of the paper, worked out by hand for one latent with the threshold 1 and the bandwidth 1."""
    objective = JumpReLU(1, target=0.5, bandwidth=1.0, weight=3.0, warm_up=0.0)
    z = torch.tensor([[1.2], [0.8], [4.0], [-2.0]], requires_grad=True)
    coded = objective.code(z, 1.0)
    np.testing.assert_allclose(coded.codes.detach().numpy().ravel(), [1.2, 0.0, 4.0, 0.0], rtol=1e-6)
    coded.codes.sum().backward()
    assert z.grad is not None
    assert z.grad.ravel().tolist() == [1.0, 0.0, 1.0, 0.0]
    # Two values lie within half a bandwidth of the threshold; its logarithm has the same derivative at 1.
    assert objective.log_threshold.grad is not None
    assert objective.log_threshold.grad.item() == pytest.approx(-2.0)
    objective.log_threshold.grad = None
    objective.code(torch.tensor([[1.2], [0.8], [4.0], [1.1]]), 1.0).penalty.backward()
    # L0 = 3/4, so 3 * 2 * (L0/0.5 - 1) / 0.5 * dL0, and dL0 = -(3 near) / 4 rows.
    assert objective.log_threshold.grad.item() == pytest.approx(3 * 2 * 0.5 / 0.5 * -0.75)


def test_dead_latents_are_counted_and_explain_what_is_left_over() -> None:
    model = Autoencoder(4, 3, torch.Generator().manual_seed(0))
    dead = DeadLatents(3, after=4, most=2)
    codes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    dead.count(codes)
    assert not dead.mask.any()
    assert dead.loss(model, torch.ones((2, 3)), torch.ones((2, 4))).item() == 0.0
    dead.count(codes)
    assert dead.mask.tolist() == [False, True, True]
    residual = torch.randn((2, 4), generator=torch.Generator().manual_seed(1))
    nothing = dead.loss(model, torch.full((2, 3), -1.0), residual)
    assert nothing.item() == pytest.approx(1.0)
    exact = (model.decoder[1] * 2.0).detach().repeat(2, 1)
    pre = torch.tensor([[9.0, 2.0, 0.0], [9.0, 2.0, 0.0]], requires_grad=True)
    explained = dead.loss(model, pre, exact)
    assert explained.item() == pytest.approx(0.0, abs=1e-6)
    explained.backward()
    assert pre.grad is not None
    assert pre.grad[:, 0].abs().sum() == 0, "living latents have no part in it"


def test_rows_of_several_arrays_are_as_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((5, 3)).astype(np.float16), rng.standard_normal((4, 3)).astype(np.float32)
    kept = np.array([0, 2, 3])
    centre = np.array([1.0, -2.0, 0.5], dtype=np.float32)
    pool = RowPool([first, second], kept=[None, kept], centre=centre)
    expected = np.concatenate([first.astype(np.float32), second[kept]]) + centre
    assert len(pool) == 8
    index = rng.permutation(8)
    np.testing.assert_array_equal(pool.take(index), expected[index])
    assert pool.sample(100, 0).shape == (8, 3)
    np.testing.assert_allclose(pool.norms(), np.linalg.norm(expected, axis=1), rtol=1e-6)
    mask = np.arange(8) % 3 > 0
    np.testing.assert_array_equal(pool.only(mask).take(np.arange(mask.sum())), expected[mask])
    for nothing in (lambda: RowPool([]), lambda: pool.only(np.zeros(8, dtype=np.bool_))):
        with pytest.raises(RowsError, match="at least one row"):
            nothing()


def test_scaled_rows_have_mean_zero_and_mean_square_d_model() -> None:
    rows = planted(3000)[1]
    scaled = Scaling.of(rows).apply(rows)
    np.testing.assert_allclose(scaled.mean(axis=0), 0.0, atol=1e-4)
    assert np.square(scaled).sum(axis=1).mean() == pytest.approx(D_MODEL, rel=1e-4)
    with pytest.raises(ScalingError, match="all the same"):
        Scaling.of(np.ones((5, 3), dtype=np.float32))


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(TrainerError, match="fewer than the 512"):
        train_autoencoder(RowPool([planted(100)[1]]), settings(ACTIVATIONS[0]))
