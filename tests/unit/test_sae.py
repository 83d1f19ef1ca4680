"""A sparse autoencoder against the plain definitions of the papers, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.artifact import ArtifactError, card_path_of
from probes.sae.file import Precision, SaeCard, load_sae, save_sae
from probes.sae.normalisation import Normalisation
from probes.sae.sae import Activation, Sae, SaeError
from probes.taps import Tap
from tests.unit.artifacts import D_MODEL, DIGEST, model_ref

WIDTH = 12
Weights = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def weights(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    shapes = {"encoder": (WIDTH, D_MODEL), "decoder": (WIDTH, D_MODEL), "decoder_bias": (D_MODEL,)}
    shapes |= {name: (WIDTH,) for name in ("encoder_bias", "gate_bias", "log_gain", "magnitude_bias", "threshold")}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def normalised(rows: np.ndarray[Any, Any], normalisation: Normalisation) -> np.ndarray[Any, Any]:
    """As SAELens has it."""
    if normalisation is Normalisation.RMS:
        return rows * np.sqrt(rows.shape[1]) / np.linalg.norm(rows, axis=1, keepdims=True)
    if normalisation is Normalisation.LAYER:
        return (rows - rows.mean(axis=1, keepdims=True)) / (rows.std(axis=1, ddof=1, keepdims=True) + 1e-5)
    return rows


def agree(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], margin: np.ndarray[Any, Any]) -> None:
    """Within 1e-5 of the scale, and the same active set outside that distance from the threshold."""
    band = 1e-5 * max(1.0, float(np.abs(margin).max()), float(np.abs(wanted).max()))
    clear = np.abs(margin) > band
    np.testing.assert_allclose(found[clear], wanted[clear], atol=band)
    np.testing.assert_array_equal(found[clear] > 0, wanted[clear] > 0)
    assert clear.mean() > 0.9


@given(
    seed=st.integers(0, 10_000),
    normalisation=st.sampled_from(Normalisation),
    subtracts=st.booleans(),
    factor=st.floats(0.05, 20),
    activation=st.sampled_from([Activation.RELU, Activation.JUMPRELU, Activation.GATED]),
)
def test_folded_weights_encode_and_decode_as_the_papers_say(
    seed: int, normalisation: Normalisation, subtracts: bool, factor: float, activation: Activation
) -> None:
    w = weights(seed)
    rows = np.random.default_rng(seed + 1).normal(size=(20, D_MODEL)) * 10
    given_in = normalised(rows, normalisation) * factor - (w["decoder_bias"] if subtracts else 0.0)
    common: dict[str, Any] = {
        "tap": Tap(1),
        "decoder": w["decoder"],
        "decoder_bias": w["decoder_bias"],
        "subtracts_decoder_bias": subtracts,
        "input_factor": factor,
        "normalisation": normalisation,
    }
    product = given_in @ w["encoder"].T
    if activation is Activation.GATED:
        sae = Sae.gated(
            encoder=w["encoder"],
            gate_bias=w["gate_bias"],
            log_gain=w["log_gain"],
            magnitude_bias=w["magnitude_bias"],
            **common,
        )
        margin = product + w["gate_bias"]
        wanted = (margin > 0) * np.maximum(np.exp(w["log_gain"]) * product + w["magnitude_bias"], 0)
    else:
        threshold = w["threshold"] if activation is Activation.JUMPRELU else np.zeros(WIDTH)
        sae = Sae.folded(
            activation=activation,
            encoder=w["encoder"],
            encoder_bias=w["encoder_bias"],
            threshold=threshold,
            **common,
        )
        before = product + w["encoder_bias"]
        margin = before - threshold
        wanted = np.maximum(before, 0) * (before > threshold)
    found = sae.encode(rows)
    agree(found, wanted, margin)
    rebuilt = (found @ w["decoder"] + w["decoder_bias"]) / factor
    if normalisation is Normalisation.RMS:
        rebuilt = rebuilt * np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(D_MODEL)
    if normalisation is Normalisation.LAYER:
        rebuilt = rebuilt * rows.std(axis=1, ddof=1, keepdims=True) + rows.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(sae.decode(found, rows), rebuilt, atol=3e-5 * max(1.0, np.abs(rebuilt).max()))


@given(seed=st.integers(0, 10_000), latents=st.permutations(range(WIDTH)), count=st.integers(1, WIDTH))
def test_some_latents_are_those_of_the_full_encode(seed: int, latents: list[int], count: int) -> None:
    sae = make_sae(seed)
    rows = np.random.default_rng(seed).normal(size=(9, D_MODEL)).astype(np.float32) * 30
    chosen = latents[:count]
    full = sae.pre_activations(rows)[:, chosen]
    agree(sae.encode_some(rows, chosen), sae.encode(rows)[:, chosen], full - sae.threshold[chosen])
    weight, bias = sae.directions(chosen)
    np.testing.assert_allclose(rows @ weight + bias, full, atol=1e-5 * np.abs(full).max())


def make_sae(seed: int = 0, **changes: Any) -> Sae:
    w = weights(seed)
    parts: dict[str, Any] = {name: w[name] for name in ("encoder", "encoder_bias", "decoder", "decoder_bias")}
    parts |= {"tap": Tap(1), "activation": Activation.JUMPRELU, "threshold": np.abs(w["threshold"])}
    return Sae.folded(**(parts | changes))


def make_card(**changes: Any) -> SaeCard:
    fields: dict[str, Any] = {
        "name": "layer1",
        "description": "made by a test",
        "model": model_ref(),
        "skip_first": 1,
        "tensors_digest": DIGEST,
        "tap": "resid_post.0",
        "width": 1,
        "activation": Activation.RELU,
        "precision": Precision.FLOAT32,
        "origin": "a test",
        "corpus": "not stated",
        "licence": "not stated",
    }
    return SaeCard(**(fields | changes))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    sae = make_sae(normalisation=Normalisation.RMS, output_tap=Tap.parse("mlp_out.1"))
    density = np.linspace(0, 1, WIDTH)
    save_sae(tmp_path / "a.safetensors", sae, make_card(), density=density)
    stored = load_sae(tmp_path / "a.safetensors")
    back = stored.sae()
    for name in ("encoder", "encoder_bias", "threshold", "decoder", "decoder_bias"):
        np.testing.assert_array_equal(getattr(back, name), getattr(sae, name))
    assert (back.tap, back.output_tap, back.activation, back.normalisation) == (
        sae.tap,
        sae.output_tap,
        sae.activation,
        sae.normalisation,
    )
    assert back.is_transcoder
    found = stored.density()
    assert found is not None
    np.testing.assert_allclose(found, density, rtol=1e-6)
    np.testing.assert_array_equal(stored.latents([3, 1]).encoder, sae.encoder[[3, 1]])


def test_half_precision_costs_a_thousandth(tmp_path: Path) -> None:
    sae = make_sae()
    save_sae(tmp_path / "half.safetensors", sae, make_card(precision=Precision.FLOAT16))
    back = load_sae(tmp_path / "half.safetensors").sae()
    rows = np.random.default_rng(0).normal(size=(50, D_MODEL)).astype(np.float32)
    found, wanted = back.pre_activations(rows), sae.pre_activations(rows)
    assert 0 < np.abs(found - wanted).max() < 2e-3 * np.abs(wanted).max()
    with pytest.raises(SaeError, match="float32"):
        save_sae(
            tmp_path / "large.safetensors",
            make_sae(encoder=weights(0)["encoder"] * 1e6),
            make_card(precision=Precision.FLOAT16),
        )


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_sae(path, make_sae(), make_card())
    with pytest.raises(SaeError, match="latent 12 does not exist: there are 12"):
        load_sae(path).latents([12])
    text = card_path_of(path).read_text()
    card_path_of(path).write_text(text.replace('"width": 12', '"width": 13'))
    with pytest.raises(ArtifactError, match=r"'encoder' has the shape \(12, 8\)"):
        load_sae(path).sae()
    card_path_of(path).write_text(text)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match="SHA-256"):
        load_sae(path)
    with pytest.raises(SaeError, match="another model"):
        save_sae(path, make_sae(), make_card(model=model_ref(d_model=4)))


def test_parts_that_do_not_fit_are_refused() -> None:
    w = weights(0)
    with pytest.raises(SaeError, match="decoder has the shape"):
        make_sae(decoder=w["decoder"].T)
    with pytest.raises(SaeError, match="NaN"):
        make_sae(encoder=np.where(w["encoder"] > 2, np.nan, w["encoder"]) * np.nan)
    with pytest.raises(SaeError, match="rows have the shape"):
        make_sae().encode(np.zeros((2, D_MODEL + 1)))
    with pytest.raises(SaeError, match="pass the rows"):
        make_sae(normalisation=Normalisation.LAYER).decode(np.zeros((1, WIDTH)))
    with pytest.raises(SaeError, match="named twice"):
        make_sae().only([1, 1])
    with pytest.raises(ValueError, match="read-only"):
        make_sae().encoder[0, 0] = 1.0
