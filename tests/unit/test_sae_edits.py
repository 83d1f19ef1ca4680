"""Edits of latents: what the engine's update makes of a row is the decoded change of its codes, within its bounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from scipy.sparse import csr_array
from sklearn.metrics import mutual_info_score
from typer.testing import CliRunner

from monitor.entries import SteerEntry
from probes.fit.steer.pairs import PairError
from probes.sae.describe.codes import Codes
from probes.sae.edits import EditKind, choose_edits
from probes.sae.latent_steer import LatentSteer
from probes.sae.sae import Activation
from probes.steering import SteerError
from probes.steering.artifact import Safety
from probes.steering.raise_latent import RaiseLatent
from probes.steering.reduce_latent import ReduceLatent
from serving.cli import app
from tests.support.planted_sae import PLANTED, planted_sae, sentences
from tests.unit.artifacts import D_MODEL
from tests.unit.saes import WIDTH, random_sae, stored_sae

EVERY = 1000.0


@given(
    seed=st.integers(0, 10_000),
    activation=st.sampled_from([Activation.RELU, Activation.JUMPRELU, Activation.GATED]),
    latent=st.integers(0, WIDTH - 1),
    level=st.floats(0.1, 6),
    is_raised=st.booleans(),
)
def test_the_update_is_the_decoded_change_of_the_codes(
    *, seed: int, activation: Activation, latent: int, level: float, is_raised: bool
) -> None:
    sae = random_sae(seed, activation=activation)
    rows = (np.random.default_rng(seed).normal(size=(60, D_MODEL)) * 3).astype(np.float32)
    vector = LatentSteer(stored_sae(sae), latent, Safety.NEUTRAL).steering_vector()
    operator = RaiseLatent(floor=level) if is_raised else ReduceLatent(by=level)
    found, dose = operator.update(vector, max_dose=EVERY).apply(rows.astype(np.float64), np.ones(60, dtype=bool))
    code, before = sae.encode(rows)[:, latent], sae.pre_activations(rows)[:, latent]
    threshold = float(sae.threshold[latent])
    clear = np.abs(before - threshold) > 1e-4
    if is_raised:
        change = np.maximum(level - code, 0)
        below = (before > 0) & (before <= threshold)
        change[below] = np.maximum(level - before[below], 0)
    else:
        change = -np.minimum(code, level)
    wanted = rows + change[:, None] * sae.decoder[latent]
    np.testing.assert_allclose(found[clear], wanted[clear], atol=2e-3)
    length = np.linalg.norm(sae.decoder[latent].astype(np.float64))
    assert dose.max() <= level * length * (1 + 1e-6)


def test_a_floor_beyond_the_dose_is_refused() -> None:
    vector = LatentSteer(stored_sae(random_sae(0)), 1, Safety.NEUTRAL).steering_vector()
    with pytest.raises(SteerError, match="Lower the floor, or raise max_dose"):
        RaiseLatent(floor=1e6).update(vector, max_dose=0.1)


def random_codes(labels: np.ndarray) -> Codes:
    """40 texts of 5 tokens; latent 3 is of label 1, latent 6 of label 0, the others of neither."""
    generator = np.random.default_rng(0)
    side = np.repeat(labels, 5)
    dense = generator.random((len(side), 8)) * (generator.random((len(side), 8)) < 0.2)
    dense[:, 3] = np.where((side == 1) & (generator.random(len(side)) < 0.7), 2.0, 0.0)
    dense[:, 6] = np.where((side == 0) & (generator.random(len(side)) < 0.7), 4.0, 0.0)
    return Codes(csr_array(dense.astype(np.float32)), np.zeros(len(side), dtype=np.int64), np.arange(0, 201, 5))


def test_latents_are_chosen_by_information_and_edited_to_what_they_usually_hold() -> None:
    labels = np.tile([1, 0], 20)
    codes = random_codes(labels)
    edits = choose_edits(codes, labels, each=1)
    assert [(edit.kind, edit.latent, edit.level) for edit in edits] == [
        (EditKind.RAISE, 3, 2.0),
        (EditKind.REDUCE, 6, 4.0),
    ]
    for edit in edits:
        expected = mutual_info_score(codes.maxima()[:, edit.latent] > 0, labels)
        assert edit.information == pytest.approx(expected, abs=1e-12)


def test_pairs_that_no_latent_tells_apart_are_refused() -> None:
    labels = np.tile([1, 0], 20)
    codes = Codes(csr_array(np.zeros((200, 4), dtype=np.float32)), np.zeros(200, dtype=np.int64), np.arange(0, 201, 5))
    with pytest.raises(PairError, match="no latent"):
        choose_edits(codes, labels, each=2)


def test_the_command_prints_steers_that_a_policy_file_takes(model_dir: Path, tmp_path: Path) -> None:
    sae = planted_sae(model_dir, tmp_path / "planted.safetensors")
    texts = [text.replace("money", "a").replace("party", "a") for text in sentences(10, 3)]
    lines = [{"positive": f"{text} money", "negative": f"{text} party"} for text in texts]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(line) for line in lines))
    command = ["sae", "edits", str(sae.path), "--pairs", str(pairs), "--name", "rich", "--more-is", "safer"]
    command += ["--each", "1", "--format", "raw", "--model", str(model_dir)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    entries = [
        SteerEntry.model_validate_json(json.dumps(entry)) for entry in YAML(typ="safe").load(result.stdout)["steers"]
    ]
    assert [(entry.latent, entry.more_is) for entry in entries] == [
        (PLANTED.index("money"), Safety.SAFER),
        (PLANTED.index("party"), Safety.LESS_SAFE),
    ]
    assert [type(entry.operator()) for entry in entries] == [RaiseLatent, ReduceLatent]
