"""The bank: detectors read together score as each alone, no column has two owners, the digest sees every weight."""

from __future__ import annotations

from itertools import chain

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probes.artifact import Artifact, ArtifactError
from probes.bank import Bank, BankError
from probes.detectors import load_detector
from probes.detectors.linear import Linear
from probes.taps import Tap
from tests.unit.artifacts import linear_tensors, make_card, model_ref, unit_artifact

NUM_LAYERS = 6
SCALE_TOLERANCE = 1e-5
Float32 = npt.NDArray[np.float32]


def readout(bank: Bank, streams: dict[Tap, Float32]) -> Float32:
    """What the engine computes: true float32 products, then the squared norm."""
    parts: list[Float32] = []
    for matrix in bank.matrices:
        stream = streams[matrix.tap]
        assert matrix.weight.dtype == matrix.bias.dtype == stream.dtype == np.float32
        parts += [stream @ matrix.weight + matrix.bias, np.square(stream).sum(axis=1, keepdims=True)]
    return np.concatenate(parts, axis=1)


def linear(name: str, layer: int, rng: np.random.Generator, d_model: int) -> Linear:
    return Linear(name, Tap(layer), rng.standard_normal(d_model) * 10.0 ** rng.integers(-2, 3), rng.normal())


def make_bank(detectors: list[Linear], d_model: int, capacity: int = 16) -> Bank:
    return Bank(detectors, d_model=d_model, num_layers=NUM_LAYERS, capacity=capacity)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.lists(st.integers(0, NUM_LAYERS - 1), min_size=1, max_size=10),
    d_model=st.sampled_from([4, 64, 257]),
    seed=st.integers(0, 2**32 - 1),
)
def test_fused_is_each_alone(layers: list[int], d_model: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    detectors = [linear(f"d{number}", layer, rng, d_model) for number, layer in enumerate(layers)]
    streams = {Tap(layer): (rng.standard_normal((9, d_model)) * 30).astype(np.float32) for layer in layers}
    bank = make_bank(detectors, d_model)
    fused = bank.score(readout(bank, streams))
    assert fused.shape == (9, len(detectors))
    for place, detector in enumerate(detectors):
        alone = make_bank([detector], d_model, capacity=1)
        exact = streams[detector.tap].astype(np.float64) @ detector.weight + detector.bias
        scale = np.linalg.norm(streams[detector.tap], axis=1).max() * np.linalg.norm(detector.weight)
        assert np.abs(fused[:, place] - exact).max() <= SCALE_TOLERANCE * scale
        assert np.abs(fused[:, place] - alone.score(readout(alone, streams))[:, 0]).max() <= SCALE_TOLERANCE * scale
        assert bank.index[detector.name] == place


@settings(max_examples=40, deadline=None)
@given(layers=st.lists(st.integers(0, NUM_LAYERS - 1), min_size=1, max_size=10))
def test_columns_never_overlap(layers: list[int]) -> None:
    rng = np.random.default_rng(0)
    bank = make_bank([linear(f"d{number}", layer, rng, 4) for number, layer in enumerate(layers)], 4)
    owned = list(chain.from_iterable(index.tolist() for taps in bank.columns.values() for index in taps.values()))
    norms = [bank.norm_column(tap) for tap in bank.taps]
    assert len(set(owned + norms)) == len(owned) + len(norms)
    assert sorted(owned + norms) == bank.used_columns().tolist()
    assert max(owned + norms) < bank.width
    assert bank.taps == tuple(sorted({Tap(layer) for layer in layers}))


def test_the_norm_stands_in_its_column() -> None:
    rng = np.random.default_rng(0)
    bank = make_bank([linear("a", 1, rng, 4), linear("b", 4, rng, 4)], 4, capacity=3)
    streams = {Tap(1): np.full((1, 4), 2.0, np.float32), Tap(4): np.full((1, 4), 3.0, np.float32)}
    row = readout(bank, streams)[0]
    assert [row[bank.norm_column(Tap(1))], row[bank.norm_column(Tap(4))]] == [16.0, 36.0]


def test_unused_columns_hold_nothing() -> None:
    bank = make_bank([linear("a", 0, np.random.default_rng(0), 4)], 4, capacity=5)
    (matrix,) = bank.matrices
    assert matrix.used == 1
    assert not matrix.weight[:, 1:].any()
    assert not matrix.bias[1:].any()


def test_too_few_columns_name_the_setting() -> None:
    rng = np.random.default_rng(0)
    detectors = [linear(f"d{number}", 2, rng, 4) for number in range(3)] + [linear("other", 1, rng, 4)]
    with pytest.raises(
        BankError, match=r"resid_post\.2: .* need 3 directions, 2 are reserved.*reserve\.directions to 3"
    ):
        make_bank(detectors, 4, capacity=2)
    assert make_bank(detectors, 4, capacity=3).width == 2 * 4


def test_what_does_not_fit_the_model_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(BankError, match=r"'a' reads 4 dimensions at resid_post\.0; the model has 8"):
        make_bank([linear("a", 0, rng, 4)], 8)
    with pytest.raises(BankError, match="layers are 0 to 5"):
        make_bank([linear("a", NUM_LAYERS, rng, 4)], 4)
    with pytest.raises(BankError, match="two detectors are named 'a'"):
        make_bank([linear("a", 0, rng, 4), linear("a", 1, rng, 4)], 4)


@settings(max_examples=40, deadline=None)
@given(number=st.integers(0, 3), dimension=st.integers(0, 7), what=st.sampled_from(["weight", "bias", "tap", "name"]))
def test_the_digest_sees_every_change(number: int, dimension: int, what: str) -> None:
    def build() -> list[Linear]:
        rng = np.random.default_rng(1)
        return [linear(f"d{place}", place % 2, rng, 8) for place in range(4)]

    detectors = build()
    changed = detectors[number]
    match what:
        case "weight":
            changed.weight[dimension] *= 1 + 1e-6
        case "bias":
            changed.bias += 1e-6 * (1 + abs(changed.bias))
        case "tap":
            changed.tap = Tap(changed.tap.layer + 2)
        case _:
            changed.name = "renamed"
    assert make_bank(detectors, 8).digest() != make_bank(build(), 8).digest()
    assert make_bank(build(), 8).digest() == make_bank(build(), 8).digest()


def test_linear_is_sklearn() -> None:
    """Standardisation, folded into one weight, gives ``decision_function``."""
    rng = np.random.default_rng(2)
    width = 64
    offset, spread = rng.standard_normal(width) * 100, 10.0 ** rng.uniform(-2, 3, width)
    inputs = rng.standard_normal((400, width)) * spread + offset
    labels = ((inputs - offset) / spread)[:, :3].sum(axis=1) + rng.standard_normal(400) > 0
    scaler = StandardScaler().fit(inputs)
    model = LogisticRegression(max_iter=500).fit(scaler.transform(inputs), labels)
    tensors = {
        "direction": model.coef_[0],
        "mean": scaler.mean_,
        "scale": scaler.scale_,
        "bias": model.intercept_,
    }
    artifact = Artifact(unit_artifact(make_card()).path, make_card(model=model_ref(d_model=width)), tensors)
    (directions,) = load_detector(artifact).directions()
    found = inputs @ directions.weight[:, 0] + directions.bias[0]
    assert np.abs(found - model.decision_function(scaler.transform(inputs))).max() <= 1e-6


def test_standardisation_is_folded_in_float64() -> None:
    """A mean a million spreads away: folded in float32, the bias alone would be off by more than the whole score."""
    direction, mean, scale = np.array([[0.1, 0.7], [1e6, -3e6], [0.3, 0.7]], dtype=np.float32)
    tensors = linear_tensors(direction, bias=0.25, mean=mean, scale=scale)
    artifact = Artifact(unit_artifact(make_card()).path, make_card(model=model_ref(d_model=2)), tensors)
    (directions,) = load_detector(artifact).directions()
    stream = mean.astype(np.float64) + np.array([1.0, 2.0])
    wide = direction.astype(np.float64) / scale.astype(np.float64)
    assert directions.weight.dtype == directions.bias.dtype == np.float64
    assert stream @ directions.weight[:, 0] + directions.bias[0] == pytest.approx(wide @ [1.0, 2.0] + 0.25, abs=1e-8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": np.array([1, 1, 0, -1, 1, 1, 1, 1], np.float32)}, "'scale' holds 2 values that are not positive"),
        ({"mean": np.zeros(7, np.float32)}, r"'mean' has the shape \(7,\); it must be \(8,\)"),
        ({"direction": np.full(8, np.nan, np.float32)}, "'direction' holds NaN or infinite"),
        ({"bias": np.array([np.inf], np.float32)}, "'bias' holds NaN or infinite"),
        ({"bias": np.array([1, 2], np.float32)}, r"it must be \(1,\)"),
    ],
)
def test_a_damaged_linear_detector_is_refused(changes: dict[str, npt.NDArray[np.float32]], message: str) -> None:
    artifact = unit_artifact(make_card())
    with pytest.raises(ArtifactError, match=message):
        load_detector(Artifact(artifact.path, artifact.card, {**artifact.tensors, **changes}))


def test_a_linear_detector_reads_one_tap() -> None:
    with pytest.raises(ArtifactError, match="reads one tap"):
        load_detector(unit_artifact(make_card(layers=(0, 1))))
    tensors = {name: tensor for name, tensor in unit_artifact(make_card()).tensors.items() if name != "bias"}
    with pytest.raises(ArtifactError, match="'bias' is missing; there are"):
        load_detector(Artifact(unit_artifact(make_card()).path, make_card(), tensors))
