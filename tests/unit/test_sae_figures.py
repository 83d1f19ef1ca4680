"""From rows to a sparse autoencoder with its card: what is exported, measured, compared and printed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import probes.packs
from probes.artifact import ArtifactError, write_card
from probes.card import ModelRef
from probes.fit.reading.rendered import Rendered
from probes.modelref import read_model_ref
from probes.sae.file import load_sae, save_sae
from probes.sae.sae import Activation, Sae
from probes.sae.train.config import SaeConfigError, read_config
from probes.sae.train.export import exported
from probes.sae.train.random_directions import random_directions
from probes.sae.train.reconstruction import measure_reconstruction
from probes.sae.train.rows import RowPool
from probes.sae.train.settings import TrainingSettings
from probes.sae.train.spliced import SplicedModel
from probes.sae.train.train import SaeTrainingError, evaluate_file, train_sae
from probes.sae.train.trainer import train_autoencoder
from probes.taps import Site, Tap
from serving.cli import app
from tests.support.sae_settings import TAP, write_config
from tests.support.words import D_MODEL, activations_by_hooks


class Silent:
    def say(self, text: str) -> None:
        pass

    def advance(self, label: str, done: int, total: int, note: str = "") -> None:
        pass


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelRef:
    return read_model_ref(model_dir, model_id="words", dtype="float32")


def planted_rows(count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    dictionary = rng.standard_normal((24, 12))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = np.where(rng.random((count, 24)) < 0.06, rng.uniform(0.5, 1.5, (count, 24)), 0.0)
    return (50.0 * (codes @ dictionary) + rng.normal(0, 30, 12)).astype(np.float32)


@pytest.mark.parametrize("activation", [{"kind": "batchtopk", "k": 2}, {"kind": "jumprelu", "l0": 2.0}])
def test_what_is_exported_computes_what_was_trained(activation: dict[str, object]) -> None:
    rows = planted_rows()
    settings = TrainingSettings.model_validate(
        {"width": 24, "activation": activation, "epochs": 5, "batch_rows": 256, "learning_rate": 3e-3}
    )
    trained = train_autoencoder(RowPool([rows]), settings)
    sae = exported(trained, tap=TAP, activation=Activation(str(activation["kind"])))
    np.testing.assert_allclose(np.linalg.norm(sae.decoder, axis=1), 1.0, atol=1e-3)
    with torch.no_grad():
        scaled = torch.from_numpy(trained.scaling.apply(rows))
        pre = trained.model.pre_activations(scaled)
        codes = torch.where(pre > trained.thresholds, pre, 0.0)
        given = trained.model.decode(codes).numpy() / trained.scaling.factor + trained.scaling.mean
    # The matrices are rounded to float16; rows near a threshold may fall on its other side.
    found = sae.encode(rows)
    clear = np.abs(pre.numpy() - trained.thresholds.numpy()) > 0.05
    np.testing.assert_array_equal((found > 0)[clear], (codes.numpy() > 0)[clear])
    same = clear.all(axis=1)
    assert same.mean() > 0.3
    np.testing.assert_allclose(found[same], codes.numpy()[same] / trained.scaling.factor, atol=0.3)
    np.testing.assert_allclose(sae.reconstruct(rows)[same], given[same], atol=0.5)


def test_the_reconstruction_is_measured_as_it_is_defined() -> None:
    rows = planted_rows(5000)
    sae = random_directions(rows[:2000], tap=TAP, width=40, l0=5.0, seed=0)
    found = measure_reconstruction(sae, RowPool([rows]))
    given, codes = sae.reconstruct(rows).astype(np.float64), sae.encode(rows)
    variance = np.square(rows - rows.mean(axis=0, dtype=np.float64)).sum()
    assert found.fvu == pytest.approx(np.square(rows - given).sum() / variance, rel=1e-5)
    assert found.l0 == pytest.approx((codes > 0).sum(axis=1).mean())
    np.testing.assert_allclose(found.density, (codes > 0).mean(axis=0))
    assert found.median_norm == pytest.approx(np.median(np.linalg.norm(rows, axis=1)), rel=1e-6)
    assert found.dead_share == np.mean((codes > 0).sum(axis=0) == 0)


def test_the_control_is_as_sparse_and_explains_less_than_what_was_trained() -> None:
    rows = planted_rows()
    settings = TrainingSettings.model_validate(
        {
            "width": 24,
            "activation": {"kind": "batchtopk", "k": 2},
            "epochs": 30,
            "batch_rows": 256,
            "learning_rate": 3e-3,
        }
    )
    sae = exported(train_autoencoder(RowPool([rows]), settings), tap=TAP, activation=Activation.BATCHTOPK)
    trained = measure_reconstruction(sae, RowPool([rows]))
    random_one = random_directions(rows, tap=TAP, width=24, l0=trained.l0, seed=0)
    control = measure_reconstruction(random_one, RowPool([rows]))
    assert control.l0 == pytest.approx(trained.l0, rel=0.02)
    assert np.ptp(control.density) < 0.01, "every direction is as dense as the others"
    assert trained.fvu < 0.3 < control.fvu < 1.0
    longer = Sae(**{name: getattr(random_one, name) for name in Sae.__slots__} | {"decoder": random_one.decoder * 1.2})
    assert measure_reconstruction(longer, RowPool([rows])).fvu > control.fvu, "the length is the best one"


def test_the_cross_entropy_is_that_of_the_model_with_the_rows_replaced(model_dir: Path, model: ModelRef) -> None:
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(1)
    requests = [Rendered(tuple(rng.integers(3, 20, length).tolist()), length % 4) for length in (9, 30, 12, 17)]
    shift = rng.normal(0, 0.5, D_MODEL).astype(np.float32)
    rows = np.concatenate([activations_by_hooks(model_dir, list(r.tokens))[TAP.layer][1:] for r in requests])
    limit = float(np.quantile(np.linalg.norm(rows, axis=1), 0.9))
    spliced = SplicedModel(model_dir, model=model, tap=TAP, skip_first=1, max_norm=limit)
    found = spliced.cross_entropies(
        requests, {"original": None, "same": lambda rows: rows.copy(), "shifted": lambda rows: rows + shift}
    )
    network = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()
    for name, change in (("original", 0.0), ("same", 0.0), ("shifted", torch.from_numpy(shift))):

        def hook(_module: object, _inputs: object, output: torch.Tensor, change: object = change) -> torch.Tensor:
            ordinary = output.norm(dim=-1, keepdim=True) <= limit
            ordinary[:, :1] = False
            return torch.where(ordinary, output + change, output)

        handle = network.model.layers[TAP.layer].register_forward_hook(hook)
        losses = []
        for request in requests:
            first = max(request.first, 1)
            with torch.inference_mode():
                logits = network(torch.tensor([request.tokens])).logits[0, first:-1]
            target = torch.tensor(request.tokens[first + 1 :])
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        handle.remove()
        assert found[name] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert found["shifted"] != pytest.approx(found["original"], rel=1e-3)
    assert spliced.predictions(requests) == len(torch.cat(losses))


def test_from_a_file_of_settings_to_figures_that_can_be_repeated(
    tmp_path: Path, model_dir: Path, model: ModelRef
) -> None:
    config = write_config(tmp_path)
    made = train_sae(
        config, model_dir=model_dir, model_id="words", out=tmp_path / "out", progress=Silent(), cache_dir=tmp_path
    )
    stored = load_sae(made.path)
    card, evaluation = stored.card, stored.card.evaluation
    stored.require_model(model)
    assert (card.name, card.tap, card.width, card.activation) == ("tiny", "resid_post.1", 64, Activation.BATCHTOPK)
    control = evaluation["controls"]["random_directions"]
    assert evaluation["fvu"] < 0.6 * control["fvu"]
    assert evaluation["l0"] == pytest.approx(4, rel=0.3)
    assert abs(evaluation["ce"]["reconstruction"] - evaluation["ce"]["original"]) < abs(
        evaluation["ce"]["zero_ablation"] - evaluation["ce"]["original"]
    )
    assert card.median_norm is not None and card.median_norm > 0
    density = stored.density()
    assert density is not None
    assert density.sum() == pytest.approx(card.training["on_training_rows"]["l0"], rel=1e-3)
    assert not list((tmp_path / "sae-training").glob("*.safetensors")), "the state of a finished training is removed"
    again = evaluate_file(
        made.path, config, model_dir=model_dir, model_id="words", progress=Silent(), cache_dir=tmp_path
    )
    assert again == evaluation
    transcoder = save_sae(
        tmp_path / "t.safetensors", replace(stored.sae(), output_tap=Tap(1, Site.MLP_OUT)), stored.card
    )
    with pytest.raises(SaeTrainingError, match="transcoder"):
        evaluate_file(
            transcoder.path, config, model_dir=model_dir, model_id="words", progress=Silent(), cache_dir=tmp_path
        )
    other = write_config(tmp_path, tap="resid_post.0")
    with pytest.raises(SaeTrainingError, match=r"reads resid_post\.1"):
        evaluate_file(made.path, other, model_dir=model_dir, model_id="words", progress=Silent(), cache_dir=tmp_path)


def test_the_control_on_random_weights_fits_no_served_model(tmp_path: Path, model_dir: Path, model: ModelRef) -> None:
    made = train_sae(
        write_config(tmp_path),
        model_dir=model_dir,
        model_id="words",
        out=tmp_path / "out",
        progress=Silent(),
        random_weights=True,
        cache_dir=tmp_path,
    )
    assert made.path.name == "tiny_random_weights.safetensors"
    assert "ce" not in made.card.evaluation
    with pytest.raises(ArtifactError, match="does not fit"):
        load_sae(made.path).require_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tap": "resid.1"}, "names the site"),
        ({"widht": 3}, "widht"),
        ({"collected": "rows"}, "either 'corpus' or 'collected'"),
        ({"training": {"width": 64, "activation": {"kind": "relu"}}}, "training.activation"),
        ({"corpus": {"parts": [{"source": {"kind": "jsonl"}}]}}, "path"),
    ],
)
def test_a_wrong_file_of_settings_is_refused_with_the_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SaeConfigError, match=message):
        read_config(write_config(tmp_path, **changes))


def test_a_file_that_is_no_file_of_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(SaeConfigError, match="cannot be read"):
        read_config(path)
    path.write_text("version: '1'\nname: a\nname: b\n")
    with pytest.raises(SaeConfigError, match=r"a\.yaml:3: .*duplicate"):
        read_config(path)


def test_the_shipped_settings_are_readable() -> None:
    folder = Path(probes.packs.__file__).parent / "smollm2-135m-instruct" / "saes"
    (path,) = folder.glob("*.sae.yaml")
    config = read_config(path)
    assert config.corpus is not None
    assert config.name == path.name.removesuffix(".sae.yaml")


def test_the_commands_train_measure_and_print(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "cache"))
    config, out = write_config(tmp_path), tmp_path / "saes"
    arguments = ["sae", "train", str(config), "--model", str(model_dir), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    path = out / "tiny.safetensors"
    figures = json.loads(done.stdout)
    assert figures == load_sae(path).card.evaluation
    assert re.search(r"training: \d+ of \d+, FVU 0\.\d+, L0 \d", done.stderr)

    write_card(path, load_sae(path).card.model_copy(update={"evaluation": {}}))
    arguments = ["sae", "eval", str(path), "--config", str(config), "--model", str(model_dir)]
    measured = CliRunner().invoke(app, arguments)
    assert json.loads(measured.stdout) == figures
    assert load_sae(path).card.evaluation == {}
    assert CliRunner().invoke(app, [*arguments, "--card"]).exit_code == 0
    assert load_sae(path).card.evaluation == figures
