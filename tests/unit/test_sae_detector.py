"""Latents as detectors: the full encode's codes at the price of a few rows, from a file or from the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from monitor.yaml_file import PolicyError
from probes.artifact import Artifact, ArtifactError
from probes.bank import Bank
from probes.card import Format, Stage
from probes.detectors import load_detector
from probes.sae.combine import Combine
from probes.sae.file import SaeFile, save_sae
from probes.sae.latent_artifact import latent_artifact
from probes.sae.normalisation import Normalisation
from probes.sae.sae import Activation, Sae, SaeError
from serving.cli import app
from serving.commands.sae_detector import SaeDetectorError
from serving.deployment import check_policy, load_artifacts
from tests.unit.artifacts import (
    D_MODEL,
    NUM_LAYERS,
    make_card,
    model_ref,
    policy_text,
    rule,
    saved_artifact,
    write_policy,
)
from tests.unit.saes import WIDTH, random_sae, stored_sae

ACTIVATIONS = [Activation.RELU, Activation.JUMPRELU, Activation.GATED]


def engine_reads(bank: Bank, rows: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32 products and the squared norm, as the engine writes them."""
    (matrix,) = bank.matrices
    return np.concatenate([rows @ matrix.weight + matrix.bias, np.square(rows).sum(axis=1, keepdims=True)], axis=1)


def combined(codes: np.ndarray[Any, Any], combine: Combine, weights: list[float]) -> np.ndarray[Any, Any]:
    if combine is Combine.MAX:
        return codes.max(axis=1)
    return codes @ np.asarray(weights) - 0.5 if combine is Combine.WEIGHTED else codes.sum(axis=1)


@given(
    seed=st.integers(0, 10_000),
    activation=st.sampled_from(ACTIVATIONS),
    normalisation=st.sampled_from(Normalisation),
    latents=st.permutations(range(WIDTH)),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    combines=st.lists(st.sampled_from([Combine.MAX, Combine.SUM, Combine.WEIGHTED]), min_size=4, max_size=4),
    scale=st.sampled_from([0.3, 3.0, 300.0]),
)
def test_some_rows_give_the_codes_of_the_full_encode(
    *,
    seed: int,
    activation: Activation,
    normalisation: Normalisation,
    latents: list[int],
    counts: list[int],
    combines: list[Combine],
    scale: float,
) -> None:
    """Through the bank, in the engine's float32, several detectors at once."""
    sae = random_sae(seed, activation=activation, normalisation=normalisation)
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(40, D_MODEL)) * scale).astype(np.float32)
    stored = stored_sae(sae)
    chosen = [latents[start : start + count] for start, count in enumerate(counts)]
    weights = [rng.normal(size=len(numbers)).round(3).tolist() for numbers in chosen]
    detectors = [
        load_detector(
            latent_artifact(
                stored,
                numbers,
                name=f"d{i}",
                combine=combine,
                weights=weights[i] if combine is Combine.WEIGHTED else (),
                intercept=-0.5 if combine is Combine.WEIGHTED else 0.0,
            )
        )
        for i, (numbers, combine) in enumerate(zip(chosen, combines, strict=False))
    ]
    bank = Bank(detectors, d_model=D_MODEL, num_layers=NUM_LAYERS, capacity=32)
    scores = bank.score(engine_reads(bank, rows))
    full, before = sae.encode(rows).astype(np.float64), sae.pre_activations(rows)
    size = max(1.0, float(np.abs(before).max()))
    distance = np.abs(before - sae.threshold)
    for i, (numbers, combine) in enumerate(zip(chosen, combines, strict=False)):
        clear = (distance[:, numbers] > 1e-5 * size).all(axis=1)
        assert clear.mean() > 0.9
        wanted = combined(full[:, numbers], combine, weights[i])
        np.testing.assert_allclose(scores[clear, i], wanted[clear], atol=1e-5 * size * max(1, len(numbers)))
        if combine is not Combine.WEIGHTED:
            np.testing.assert_array_equal(scores[clear, i] > 0, wanted[clear] > 0)


def test_what_does_not_fit_is_refused() -> None:
    stored = stored_sae(random_sae())
    for latents, combine, weights, message in (
        ([12], Combine.MAX, (), "latent 12 does not exist: there are 12, numbered 0 to 11"),
        ([1, 1], Combine.MAX, (), "latent 1 is named twice"),
        ([], Combine.MAX, (), "no latent is named"),
        ([1, 2], Combine.SINGLE, (), "Name one"),
        ([1, 2], Combine.WEIGHTED, (1.0,), "1 weights for 2 latents"),
        ([1], Combine.SUM, (1.0,), "'weighted' takes one for each, the others none"),
    ):
        with pytest.raises(SaeError, match=message):
            latent_artifact(stored, latents, name="d", combine=combine, weights=weights)
    made = latent_artifact(stored, [1, 2], name="d", combine=Combine.MAX)
    wrong = made.card.model_copy(update={"parameters": {**made.card.parameters, "combine": "least"}})
    with pytest.raises(ArtifactError, match="'combine'"):
        load_detector(Artifact(made.path, wrong, made.tensors))
    below = {**made.tensors, "threshold": np.array([0.0, -1.0])}
    with pytest.raises(ArtifactError, match="negative"):
        load_detector(Artifact(made.path, made.card, below))


@pytest.fixture
def sae_path(tmp_path: Path) -> Path:
    return saved(tmp_path / "sae.safetensors", random_sae())


def saved(path: Path, sae: Sae, **changes: Any) -> Path:
    stored: SaeFile = stored_sae(sae, **changes)
    return save_sae(path, sae, stored.card).path


def inline(entry: str, rules: str) -> str:
    return policy_text(rules, names=()).replace("detectors:\n", f"detectors:\n  - {entry}\n")


LATENTS = "name: chemistry, kind: sae_latent, sae: sae.safetensors, latents: [7, 3], combine: max"
WATCH = rule("watch", detector="chemistry", action="flag", stage="stream")


def test_latents_in_a_policy_file_are_a_detector(tmp_path: Path, sae_path: Path) -> None:
    text = inline(f"{{{LATENTS}, aggregate: {{kind: mean}}, threshold: {{value: 3.25}}}}", WATCH)
    plan = check_policy(write_policy(tmp_path, text).path)
    (check,) = plan.checks
    assert check.detector == "chemistry"
    assert check.stage is Stage.STREAM
    assert str(check.aggregate) == "mean"
    assert check.thresholds == dict.fromkeys(Format, 3.25)
    rows = np.random.default_rng(0).normal(size=(9, D_MODEL)).astype(np.float32)
    found = plan.bank.score(engine_reads(plan.bank, rows))[:, 0]
    np.testing.assert_allclose(found, random_sae().encode(rows)[:, [7, 3]].max(axis=1), atol=1e-5)
    stated = rule("watch", detector="chemistry", when="aggregate: {kind: last}, above: {value: 1}", action="block")
    (check,) = check_policy(write_policy(tmp_path, inline(f"{{{LATENTS}}}", stated)).path).checks
    assert (str(check.aggregate), set(check.thresholds.values())) == ("last", {1.0})


def test_a_plan_is_another_one_where_only_a_threshold_in_the_file_is(tmp_path: Path, sae_path: Path) -> None:
    text = inline(f"{{{LATENTS}, threshold: {{value: 3}}}}", WATCH)
    policy = write_policy(tmp_path, text).path
    first = check_policy(policy).digest
    sae = random_sae()
    other = Sae(
        tap=sae.tap,
        activation=sae.activation,
        encoder=sae.encoder,
        encoder_bias=sae.encoder_bias,
        threshold=sae.threshold + np.float32(0.5),
        decoder=sae.decoder,
        decoder_bias=sae.decoder_bias,
    )
    saved(sae_path, other)
    assert check_policy(policy).digest != first


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (LATENTS, r"no threshold is stated, here or beside the latents of 'chemistry'.*telltale sae detector "),
        (f"{LATENTS}, threshold: {{target_fpr: 0.01}}", r"detectors\[0\]\.threshold\.target_fpr: .*telltale calibrate"),
        (LATENTS.replace("7, 3", "7, 12"), r"detectors\[0\]\.latents: .*latent 12 does not exist: there are 12"),
        (LATENTS.replace("7, 3", "7, 7"), "'latents' names 7 twice"),
        (LATENTS.replace(", combine: max", ""), "say what is made of their codes"),
        (LATENTS.replace("max", "weighted"), "'weights' has one number for each latent"),
        (LATENTS.replace("max", "single"), "'combine' is 'single', and 'latents' names 2"),
        (LATENTS.replace("max", "most"), "Known: max, single, sum, weighted"),
        (LATENTS.replace("kind: sae_latent, ", ""), "need 'kind'"),
        (LATENTS.replace("name: chemistry, ", ""), "need 'name'"),
        ("artifact: x.safetensors, latents: [1]", "'latents' belongs to latents of a 'sae'"),
        (f"{LATENTS}, artifact: x.safetensors", "exactly one of 'pack' and 'artifact', or 'sae'"),
        (LATENTS.replace("sae.safetensors", "none.safetensors"), "none.safetensors: cannot be read"),
    ],
)
def test_a_mistake_in_the_policy_file_is_told(tmp_path: Path, sae_path: Path, entry: str, message: str) -> None:
    with pytest.raises((PolicyError, ArtifactError), match=message):
        check_policy(write_policy(tmp_path, inline(f"{{{entry}}}", WATCH)).path)


def test_a_model_by_another_name_is_the_same_model(tmp_path: Path, sae_path: Path) -> None:
    """An autoencoder is imported for a folder, the pack beside it was made for a name."""
    saved(sae_path, random_sae(), model=model_ref(id="models/fake"))
    saved_artifact(tmp_path, make_card())
    text = inline(f"{{{LATENTS}, threshold: {{value: 3}}}}\n  - artifact: harm.safetensors", WATCH)
    policy = write_policy(tmp_path, text).path
    assert {detector.name for detector in check_policy(policy).bank.detectors} == {"chemistry", "harm"}
    saved(sae_path, random_sae(), model=model_ref(weight_digest="d" * 64))
    with pytest.raises(PolicyError, match="were made on different models"):
        check_policy(policy)


def test_latents_of_another_model_are_refused(tmp_path: Path, sae_path: Path) -> None:
    text = inline(f"{{{LATENTS}, threshold: {{value: 3}}}}", WATCH)
    artifacts = load_artifacts(write_policy(tmp_path, text))
    with pytest.raises(ArtifactError, match="'chemistry' was made on 'fake' and does not fit"):
        artifacts["chemistry"].require_model(model_ref(weight_digest="d" * 64))


def test_a_detector_is_cut_out_by_a_command(tmp_path: Path, sae_path: Path) -> None:
    def run(*options: str) -> None:
        result = CliRunner().invoke(app, ["sae", "detector", str(sae_path), "--out", str(tmp_path), *options])
        if result.exception is not None:
            raise result.exception

    run("--latents", "7,3", "--name", "chemistry", "--combine", "weighted", "--weights", "2,-1", "--intercept", "0.25")
    made = Artifact.load(tmp_path / "chemistry.safetensors")
    assert made.card.parameters["latents"] == [7, 3]
    detector = load_detector(made)
    rows = np.random.default_rng(0).normal(size=(9, D_MODEL)).astype(np.float32)
    codes = random_sae().encode(rows)[:, [7, 3]]
    found = detector.score(detector.read({detector.directions()[0].tap: rows}))
    np.testing.assert_allclose(found, 2 * codes[:, 0] - codes[:, 1] + 0.25, atol=1e-5)
    for options, message in (
        (("--latents", "7,x", "--name", "a"), "must be whole numbers"),
        (("--latents", "7,3", "--name", "a"), "--combine is left out"),
        (("--latents", "7,3", "--name", "a", "--combine", "most"), "--combine is 'most'"),
        (("--latents", "7", "--name", "A b"), "--name is 'A b'"),
    ):
        with pytest.raises(SaeDetectorError, match=message):
            run(*options)


@given(
    seed=st.integers(0, 1000),
    threshold=st.one_of(st.floats(-3, 3), st.just(0.0)),
    combine=st.sampled_from([Combine.SINGLE, Combine.MAX, Combine.SUM]),
)
def test_one_latent_decides_in_the_pass(seed: int, threshold: float, combine: Combine) -> None:
    stored = stored_sae(random_sae(seed))
    detector = load_detector(latent_artifact(stored, [seed % WIDTH], name="d", combine=combine))
    limit = detector.readout_limit(threshold)
    assert limit is not None
    readouts = np.random.default_rng(seed).normal(size=(200, 2)) * 3
    tap = detector.directions()[0].tap
    np.testing.assert_array_equal(detector.score({tap: readouts}) > threshold, readouts[:, 0] > limit)


def test_what_several_numbers_decide_is_not_decided_in_the_pass() -> None:
    several = latent_artifact(stored_sae(random_sae()), [1, 2], name="d", combine=Combine.MAX)
    scaled = latent_artifact(
        stored_sae(random_sae(normalisation=Normalisation.RMS)), [1], name="d", combine=Combine.MAX
    )
    weighted = latent_artifact(stored_sae(random_sae()), [1], name="d", combine=Combine.WEIGHTED, weights=(-1.0,))
    for made in (several, scaled, weighted):
        assert load_detector(made).readout_limit(1.0) is None


@pytest.mark.parametrize("combine", [Combine.MAX, Combine.SUM])
@pytest.mark.parametrize("broken", [np.nan, -np.inf, np.inf])
def test_what_is_not_finite_is_no_silent_latent(combine: Combine, broken: float) -> None:
    """A gap follows `on_gap`; a score of 0 would pass."""
    made = [latent_artifact(stored_sae(random_sae()), [i, i + 1], name=f"d{i}", combine=combine) for i in range(2)]
    detectors = [load_detector(artifact) for artifact in made]
    bank = Bank(detectors, d_model=D_MODEL, num_layers=NUM_LAYERS, capacity=4)
    readouts = np.zeros((1, bank.width), dtype=np.float32)
    readouts[0, 0] = broken
    with np.errstate(invalid="ignore"):
        scores = bank.score(readouts)
        alone = detectors[0].score({detectors[0].directions()[0].tap: np.array([[broken, 0.0, 1.0]])})
    assert not np.isfinite(scores[0, 0])
    assert not np.isfinite(alone[0])
    assert np.isfinite(scores[0, 1])
