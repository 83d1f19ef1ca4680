"""Another library's autoencoder, checked on a model and written with a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probes.sae.file import Precision, load_sae
from probes.sae.importing import ImportedSaeError, Importing, import_sae, measure
from probes.sae.layouts import Stated
from probes.sae.sae import Activation, Sae
from probes.taps import Tap
from tests.support.words import D_MODEL


def dictionary(folder: Path, *, rank: int | None = None, layer: int = 1, width: int = D_MODEL, sign: int = 1) -> Path:
    """One that reconstructs its input: the identity and its negative, for dimensions with either sign."""
    folder.mkdir()
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    state = {
        "encoder.weight": both,
        "encoder.bias": torch.zeros(2 * width),
        "decoder.weight": sign * both.T.contiguous(),
    }
    state |= {"b_dec": torch.zeros(width)} if rank else {"bias": torch.zeros(width)}
    torch.save(state, folder / "ae.pt")
    kind = "AutoEncoderTopK" if rank else "AutoEncoder"
    trainer = {"dict_class": kind, "layer": layer, "lm_name": "org/words", "k": rank}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def importing(path: Path, model_dir: Path, tmp_path: Path, **changes: Any) -> Importing:
    fields: dict[str, Any] = {
        "path": path,
        "model_dir": model_dir,
        "model_id": "words",
        "name": "identity",
        "out": tmp_path / "saes",
        "stated": Stated(),
        "progress": lambda _text: None,
    }
    return Importing(**(fields | changes))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_what_is_imported_is_measured(model_dir: Path, tmp_path: Path) -> None:
    path = dictionary(tmp_path / "relu")
    made = import_sae(importing(path, model_dir, tmp_path, precision=Precision.FLOAT16, licence="MIT"))
    stored = load_sae(made.path)
    card = stored.card
    assert card == made.card
    assert (card.tap, card.width, card.licence) == ("resid_post.1", 2 * D_MODEL, "MIT")
    told = card.evaluation["ordinary_text"]
    assert told["fvu"] < 1e-6
    assert told["l0"] == pytest.approx(D_MODEL, abs=0.01)
    density = stored.density()
    assert density is not None
    np.testing.assert_allclose(density[:D_MODEL] + density[D_MODEL:], 1.0, atol=1e-5)
    assert card.median_norm is not None
    assert stored.tensors["encoder"].dtype == np.float16
    again = import_sae(importing(made.path, model_dir, tmp_path, name="again"))
    np.testing.assert_array_equal(again.sae().encoder, made.sae().encoder)


def test_a_rank_becomes_a_threshold_and_the_card_says_how_well(model_dir: Path, tmp_path: Path) -> None:
    made = import_sae(importing(dictionary(tmp_path / "topk", rank=8), model_dir, tmp_path))
    conversion = made.card.conversion
    assert (conversion["rank"], made.card.activation) == (8, Activation.TOPK)
    assert 0.3 < conversion["jaccard"] < 1
    assert np.unique(made.sae().threshold) == pytest.approx(conversion["threshold"], abs=1e-4)
    assert made.card.evaluation["ordinary_text"]["l0"] == pytest.approx(8, abs=1)


def test_another_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    path = dictionary(tmp_path / "relu")
    with pytest.raises(ImportedSaeError, match="was trained on 'org/words' by its files, and --model is 'letters'"):
        import_sae(importing(path, model_dir, tmp_path, model_id="letters"))
    forced = import_sae(importing(path, model_dir, tmp_path, model_id="letters", force=True))
    assert forced.card.training["trained_on"] == "org/words"
    with pytest.raises(ImportedSaeError, match=r"16 dimensions at resid_post\.1"):
        import_sae(importing(dictionary(tmp_path / "narrow", width=16), model_dir, tmp_path))
    with pytest.raises(ImportedSaeError, match="layers 0 to 2"):
        import_sae(importing(dictionary(tmp_path / "deep", layer=3), model_dir, tmp_path))


def test_a_name_is_checked_before_anything_is_read(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ImportedSaeError, match="the name is 'Layer 15'"):
        import_sae(importing(tmp_path / "none", model_dir, tmp_path, name="Layer 15"))


def test_one_that_explains_nothing_is_refused(model_dir: Path, tmp_path: Path) -> None:
    path = dictionary(tmp_path / "mirrored", sign=-1)
    with pytest.raises(ImportedSaeError, match="it explains nothing here"):
        import_sae(importing(path, model_dir, tmp_path))
    forced = import_sae(importing(path, model_dir, tmp_path, force=True))
    assert forced.card.evaluation["ordinary_text"]["fvu"] > 1


def test_figures_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    sae = Sae.folded(
        tap=Tap(0),
        activation=Activation.RELU,
        encoder=rng.normal(size=(12, 5)),
        encoder_bias=rng.normal(size=12),
        decoder=rng.normal(size=(12, 5)),
        decoder_bias=rng.normal(size=5),
    )
    rows = rng.normal(size=(2500, 5)).astype(np.float32)
    found = measure(sae, rows)
    codes = sae.encode(rows)
    unexplained = np.square(rows - sae.decode(codes)).sum() / np.square(rows - rows.mean(axis=0)).sum()
    assert found.fvu == pytest.approx(unexplained, rel=1e-4)
    assert found.l0 == pytest.approx((codes > 0).sum(axis=1).mean())
    np.testing.assert_allclose(found.density, (codes > 0).mean(axis=0), rtol=1e-5)
