"""Files of other libraries: read as those libraries read them, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from probes.sae.hook_point import tap_of_hook
from probes.sae.layouts import Layout, LayoutError, Stated, layout_kinds, read_layout
from probes.sae.rank import threshold_for_rank
from probes.sae.sae import Activation, Sae, SaeError
from probes.taps import Tap

FIXTURES = Path(__file__).parents[1] / "data" / "saelens"
D_MODEL, WIDTH = 6, 10
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())


def close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMES)
def test_saelens_files_encode_and_decode_as_saelens_does(name: str) -> None:
    found = read_layout(FIXTURES / name, Stated())
    expected = load_file(FIXTURES / name / "expected.safetensors")
    rows, codes = expected["rows"], expected["codes"]
    if found.rank is None:
        close(found.sae.encode(rows), codes)
        np.testing.assert_array_equal(found.sae.encode(rows) > 0, codes > 0)
    else:
        before = found.sae.encode(rows)
        ranked = np.sort(before, axis=1)[:, -found.rank]
        close(np.where(before >= ranked[:, None], before, 0), codes)
    if found.sae.is_transcoder:
        assert (found.sae.tap, found.sae.output_tap) == (Tap(1), Tap.parse("mlp_out.2"))
    assert found.sae.tap == Tap(1)
    close(found.sae.decode(codes, rows), expected["reconstruction"])
    assert (found.model, found.corpus) == ("fake", "made-up")


def copied(tmp_path: Path, name: str = "standard", **changes: Any) -> Path:
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    config = json.loads((folder / "cfg.json").read_text())
    metadata = {**config["metadata"], **changes.pop("metadata", {})}
    (folder / "cfg.json").write_text(json.dumps({**config, **changes, "metadata": metadata}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 25}, r"'W_enc' has the shape \(16, 24\); by the configuration beside it, it must be \(16, 25\)"),
        ({"architecture": "temporal"}, "architecture is 'temporal'"),
        ({"normalize_activations": "covariance_whitening"}, "folded into the weights"),
        ({"normalize_activations": "expected_average_only_in"}, "--input-factor"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        (
            {"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}},
            "'blocks.1.ln2.hook_normalized', which is no tap",
        ),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "no tap"),
        ({"metadata": {"hook_name": None}}, "--tap resid_post.LAYER"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read_layout(copied(tmp_path, **changes), Stated())


def test_a_tap_that_contradicts_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"reads resid_post\.1 by its files, and --tap says resid_post\.2"):
        read_layout(FIXTURES / "standard", Stated(tap=Tap(2)))
    with pytest.raises(LayoutError, match="holds no sparse autoencoder in a layout that is read"):
        read_layout(tmp_path, Stated())
    with pytest.raises(LayoutError, match="there is no such folder"):
        read_layout(tmp_path / "none", Stated())


def test_a_stated_factor_is_folded_in(tmp_path: Path) -> None:
    folder = copied(tmp_path, normalize_activations="expected_average_only_in")
    expected = load_file(FIXTURES / "standard" / "expected.safetensors")
    found = read_layout(folder, Stated(input_factor=0.25)).sae
    close(found.encode(expected["rows"] * 4), expected["codes"])
    close(found.decode(expected["codes"]), expected["reconstruction"] * 4)


@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("blocks.3.hook_resid_post", "resid_post.3"),
        ("blocks.3.hook_resid_pre", "resid_post.2"),
        ("blocks.0.hook_mlp_out", "mlp_out.0"),
        ("model.layers.7", "resid_post.7"),
        ("layers.7.mlp", "mlp_out.7"),
        ("transformer.h.2.attn", "attn_out.2"),
    ],
)
def test_hook_points_are_taps(name: str, tap: str) -> None:
    assert str(tap_of_hook(name, where="cfg.json")) == tap


class Weights:
    """Of one that is random, and what the papers make of it."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.encoder = rng.normal(size=(WIDTH, D_MODEL)).astype(np.float32)
        self.decoder = rng.normal(size=(WIDTH, D_MODEL)).astype(np.float32)
        self.bias = rng.normal(size=WIDTH).astype(np.float32)
        self.decoder_bias = rng.normal(size=D_MODEL).astype(np.float32)
        self.threshold = np.abs(rng.normal(size=WIDTH)).astype(np.float32)
        self.extra = rng.normal(size=(2, WIDTH)).astype(np.float32)
        self.rows = rng.normal(size=(40, D_MODEL)).astype(np.float32) * 2
        self.norms = np.linalg.norm(self.decoder, axis=1)

    def before(self, *, subtract: bool) -> np.ndarray[Any, Any]:
        rows = self.rows - self.decoder_bias if subtract else self.rows
        return rows @ self.encoder.T + self.bias


def test_gemma_scope(tmp_path: Path) -> None:
    w = Weights()
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays = {"W_enc": w.encoder.T, "W_dec": w.decoder, "b_enc": w.bias, "b_dec": w.decoder_bias}
    np.savez(folder / "params.npz", **arrays, threshold=w.threshold)
    found = read_layout(folder, Stated())
    before = w.before(subtract=False)
    close(found.sae.encode(w.rows), np.maximum(before, 0) * (before > w.threshold))
    assert (found.sae.tap, found.model) == (Tap(20), "gemma-2-2b")
    assert found.origin == "Gemma Scope, layer_20/width_16k/average_l0_71"
    other = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_20"
    shutil.copytree(folder, other)
    with pytest.raises(LayoutError, match="behind the norm that follows it"):
        read_layout(other, Stated())
    np.savez(tmp_path / "params.npz", **arrays, threshold=np.array([{"a": 1}] * WIDTH, dtype=object))
    with pytest.raises(LayoutError, match="they could execute"):
        read_layout(tmp_path / "params.npz", Stated(tap=Tap(0)))


def test_sparsify(tmp_path: Path) -> None:
    w = Weights()
    folder = tmp_path / "layers.15"
    folder.mkdir()
    config = {"d_in": D_MODEL, "num_latents": WIDTH, "k": 3, "activation": "topk", "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "some-text"}))
    tensors = {"encoder.weight": w.encoder, "encoder.bias": w.bias, "W_dec": w.decoder, "b_dec": w.decoder_bias}
    save_file(tensors, folder / "sae.safetensors")
    found = read_layout(folder, Stated())
    assert (found.rank, found.sae.tap, found.model) == (3, Tap(15), "HuggingFaceTB/SmolLM2-135M")
    close(found.sae.encode(w.rows), np.maximum(w.before(subtract=True), 0))
    for change in ({"transcode": True}, {"activation": "groupmax"}, {"gram_lookup": True}):
        (folder / "cfg.json").write_text(json.dumps(config | change))
        with pytest.raises(LayoutError, match=r"no tap|no threshold|not what a tap reads"):
            read_layout(folder, Stated())


def _dictionary(kind: str, w: Weights) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """State as the library names it, and the codes by its definition, for decoder rows of length 1."""
    linear = {"encoder.weight": w.encoder, "decoder.weight": w.decoder.T.copy(), "encoder.bias": w.bias}
    wide = {"W_enc": w.encoder.T.copy(), "W_dec": w.decoder, "b_enc": w.bias, "b_dec": w.decoder_bias}
    single = {"threshold": np.float32(0.5), "k": np.int32(3)}
    taken, whole = w.before(subtract=True), w.before(subtract=False)
    if kind == "AutoEncoder":
        return {**linear, "bias": w.decoder_bias}, np.maximum(taken, 0) * w.norms
    if kind == "AutoEncoderNew":
        return {**linear, "decoder.bias": w.decoder_bias}, np.maximum(whole, 0) * w.norms
    if kind == "JumpReluAutoEncoder":
        return {**wide, "threshold": w.threshold}, np.maximum(whole, 0) * (whole > w.threshold) * w.norms
    if kind == "GatedAutoEncoder":
        product = (w.rows - w.decoder_bias) @ w.encoder.T
        gain, size = w.extra[0] * 0.3, w.extra[1]
        state = {name: linear[name] for name in ("encoder.weight", "decoder.weight")}
        state |= {"decoder_bias": w.decoder_bias, "gate_bias": w.bias, "r_mag": gain, "mag_bias": size}
        return state, (product + w.bias > 0) * np.maximum(np.exp(gain) * product + size, 0) * w.norms
    positive = np.maximum(taken, 0)
    if kind == "AutoEncoderTopK":
        return {**linear, "b_dec": w.decoder_bias, **single}, positive
    codes = positive * (positive > 0.5)
    return ({**wide, **single} if kind.startswith("Matr") else {**linear, "b_dec": w.decoder_bias, **single}), codes


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    ],
)
def test_dictionary_learning(tmp_path: Path, kind: str) -> None:
    w = Weights()
    state, codes = _dictionary(kind, w)
    torch.save({name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}, tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "layer": 8, "lm_name": "some/model", "submodule_name": "resid_post_layer_8", "k": 3}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    found = read_layout(tmp_path, Stated())
    close(found.sae.encode(w.rows), codes)
    assert found.sae.tap == Tap(8)
    assert found.rank == (3 if kind == "AutoEncoderTopK" else None)
    if "TopK" not in kind:
        np.testing.assert_allclose(np.linalg.norm(found.sae.decoder, axis=1), 1.0, rtol=1e-5)


class Harm:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (print, ("executed",))


def test_a_pickle_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"encoder.weight": torch.zeros(2, 2), "harm": Harm()}, tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "layer": 1, "lm_name": "some/model"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(LayoutError, match="to read it would be to execute it"):
        read_layout(tmp_path, Stated())
    assert "executed" not in capsys.readouterr().out


def test_a_threshold_stands_for_a_rank() -> None:
    rng = np.random.default_rng(0)
    sae = Sae.folded(
        tap=Tap(0),
        activation=Activation.TOPK,
        encoder=rng.normal(size=(200, 20)),
        encoder_bias=np.zeros(200),
        decoder=rng.normal(size=(200, 20)),
        decoder_bias=np.zeros(20),
    )
    rows = rng.normal(size=(2000, 20)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    served, agreement = threshold_for_rank(sae, 10, rows)
    assert (served.encode(rows[0::2]) > 0).sum(axis=1).mean() == pytest.approx(10, abs=0.01)
    held_out = served.encode(rows[1::2]) > 0
    before = sae.encode(rows[1::2])
    ranked = before >= np.sort(before, axis=1)[:, -10, None]
    both, either = (held_out & ranked).sum(axis=1), (held_out | ranked).sum(axis=1)
    assert agreement.jaccard == pytest.approx((both / either).mean())
    assert agreement.kept == pytest.approx(both.sum() / ranked.sum())
    assert 0.5 < agreement.jaccard < 1
    with pytest.raises(SaeError, match="fewer"):
        threshold_for_rank(sae, 200, rows)
    with pytest.raises(SaeError, match="at least 200"):
        threshold_for_rank(sae, 10, rows[:199])


def test_every_layout_says_what_it_looks_for() -> None:
    kinds = layout_kinds()
    assert set(kinds) == {"dictionary_learning", "gemma_scope", "saelens", "sparsify", "telltale"}
    assert all(issubclass(cls, Layout) and cls.files for cls in kinds.values())
