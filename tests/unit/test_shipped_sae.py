"""The autoencoder that ships: whole, for the embedded model, made by the file beside it, better than its control."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import probes.packs
from probes.artifact import Artifact
from probes.sae.file import SaeFile, load_sae
from probes.sae.sae import Activation
from probes.sae.train.config import read_config

PACK = Path(probes.packs.__file__).parent / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def shipped() -> SaeFile:
    return load_sae(PACK / "saes" / "resid_post_15.safetensors")


def test_it_fits_the_model_of_the_detectors_beside_it(shipped: SaeFile) -> None:
    shipped.require_model(Artifact.load(PACK / "harmful_request.safetensors").card.model)


def test_it_was_made_by_the_settings_beside_it(shipped: SaeFile) -> None:
    config = read_config(shipped.path.with_suffix(".sae.yaml"))
    assert shipped.card.training["config"] == config.model_dump(mode="json", exclude={"collected"})
    assert 300_000 <= sum(shipped.card.training["tokens"].values()) <= 520_000


def test_it_is_small_and_its_weights_are_what_the_docs_say(shipped: SaeFile) -> None:
    assert shipped.path.stat().st_size < 25e6
    sae = shipped.sae()
    assert (sae.width, sae.activation) == (2304, Activation.BATCHTOPK)
    np.testing.assert_allclose(np.linalg.norm(sae.decoder, axis=1), 1.0, atol=1e-3)
    assert len(np.unique(sae.threshold)) == 1
    density = shipped.density()
    assert density is not None
    trained_on = shipped.card.training["on_training_rows"]
    assert density.sum() == pytest.approx(trained_on["l0"], rel=1e-3)
    assert np.mean(density == 0) == pytest.approx(trained_on["dead_share"], abs=1e-4)


def test_its_figures_stand_beside_those_of_random_directions(shipped: SaeFile) -> None:
    found = shipped.card.evaluation
    control = found["controls"]["random_directions"]
    ce = found["ce"]
    assert found["fvu"] < 0.5 * control["fvu"]
    worst = ce["mean_ablation"]
    assert found["ce_recovered_from_mean"] == pytest.approx(
        (worst - ce["reconstruction"]) / (worst - ce["original"]), abs=1e-3
    )
    assert found["ce_recovered_from_mean"] > control["ce_recovered_from_mean"] + 0.3
    assert found["rows"] > 10_000
