"""Latents that are set or capped: what the engine computes, against the plain definition by the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monitor.yaml_file import PolicyError
from probes.card import Format
from probes.sae.file import save_sae
from probes.sae.latent_steer import LatentSteer
from probes.sae.normalisation import Normalisation
from probes.sae.sae import Activation, Sae
from probes.steering import Operator, Sign, SteerError
from probes.steering.artifact import Safety
from probes.steering.cap import Cap
from probes.steering.cap_latent import CapLatent
from probes.steering.set_latent import SetLatent
from probes.steering.steer import Positions, Steer, make_steer, stack_steers
from probes.taps import Tap
from serving.deployment import check_policy
from serving.engine.steer_op import steer_rows
from tests.unit.artifacts import D_MODEL, make_card, policy_text, rule, saved_artifact, write_policy
from tests.unit.saes import WIDTH, random_sae, stored_sae

ACTIVATIONS = [Activation.RELU, Activation.JUMPRELU, Activation.GATED]


def steer_of(sae: Sae, latent: int, operator: Operator, *, max_dose: float = 10.0, **changes: Any) -> Steer:
    return make_steer(
        "s",
        LatentSteer(stored_sae(sae, **changes), latent, Safety.NEUTRAL),
        operator,
        positions=Positions.ALL,
        max_dose=max_dose,
        allow_safety_reducing=False,
    )


def written_by_engine(steer: Steer, rows: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, Any]:
    (matrix,) = stack_steers([steer], d_model=D_MODEL, num_layers=4)
    ones, dose = torch.ones(len(rows), 1), torch.zeros(len(rows), 1)
    parts = (torch.from_numpy(part) for part in (matrix.read, matrix.terms, matrix.write))
    return steer_rows(torch.from_numpy(rows), None, *parts, ones, dose).numpy()


@given(
    seed=st.integers(0, 10_000),
    activation=st.sampled_from(ACTIVATIONS),
    latent=st.integers(0, WIDTH - 1),
    level=st.floats(0, 6),
    strength=st.floats(0.1, 1),
    cap=st.booleans(),
)
def test_a_latent_is_changed_and_the_error_is_kept(
    *, seed: int, activation: Activation, latent: int, level: float, strength: float, cap: bool
) -> None:
    """By the autoencoder: decode the codes with this one changed, and add what they do not explain."""
    sae = random_sae(seed, activation=activation)
    rows = (np.random.default_rng(seed).normal(size=(40, D_MODEL)) * 3).astype(np.float32)
    codes = sae.encode(rows)
    target = np.minimum(codes[:, latent], level) if cap else np.full(len(rows), level)
    changed = codes.copy()
    changed[:, latent] += strength * (target - codes[:, latent])
    wanted = sae.decode(changed) + (rows - sae.decode(codes))
    operator: Operator = (
        CapLatent(ceiling=level, strength=strength) if cap else SetLatent(target=level, strength=strength)
    )
    steer = steer_of(sae, latent, operator, max_dose=1000)
    found, dose = steer.update.apply(rows.astype(np.float64), np.ones(len(rows), dtype=bool))
    before = sae.pre_activations(rows)[:, latent]
    size = 1e-5 * max(1.0, np.abs(sae.pre_activations(rows)).max(), np.abs(wanted).max())
    clear = np.abs(before - sae.threshold[latent]) > size
    assert clear.mean() > 0.9
    np.testing.assert_allclose(found[clear], wanted[clear], atol=3 * size)
    np.testing.assert_allclose(written_by_engine(steer, rows)[clear], wanted[clear], atol=3 * size)
    np.testing.assert_allclose(dose[clear], np.linalg.norm(wanted - rows, axis=1)[clear], atol=3 * size)
    if cap:
        np.testing.assert_array_equal(found[codes[:, latent] < level - size], rows[codes[:, latent] < level - size])


@given(seed=st.integers(0, 1000), dose=st.floats(0.01, 0.5))
def test_no_row_moves_further_than_max_dose(seed: int, dose: float) -> None:
    sae = random_sae(seed)
    rows = (np.random.default_rng(seed).normal(size=(20, D_MODEL)) * 20).astype(np.float32)
    steer = steer_of(sae, 3, SetLatent(target=0.0), max_dose=dose, median_norm=2.0)
    assert np.linalg.norm(written_by_engine(steer, rows) - rows, axis=1).max() <= 2.0 * dose * (1 + 1e-4)


def test_what_cannot_be_written_to_is_refused() -> None:
    operator = SetLatent(target=1.0)
    for sae, changes, message in (
        (random_sae(normalisation=Normalisation.RMS), {}, "divides each row by its own scale"),
        (random_sae(output_tap=Tap.parse("mlp_out.2")), {}, "its decoder writes mlp_out.2"),
        (random_sae(tap=Tap.parse("mlp_out.1")), {}, "reads mlp_out.1"),
        (random_sae(), {"median_norm": None, "corpus_rows": None}, "telltale sae import"),
    ):
        with pytest.raises(SteerError, match=message):
            steer_of(sae, 3, operator, **changes)
    with pytest.raises(SteerError, match="latent 12 does not exist"):
        steer_of(random_sae(), 12, operator)
    with pytest.raises(SteerError, match="no row would ever get what is asked for"):
        steer_of(random_sae(), 3, SetLatent(target=1000.0), max_dose=0.1)


@pytest.mark.parametrize(
    ("more_is", "operator", "refused"),
    [
        (None, SetLatent(target=0.0), "nobody has said what more of latent 3"),
        (Safety.SAFER, SetLatent(target=0.0), "less of latent 3"),
        (Safety.SAFER, SetLatent(target=9.0), "less of latent 3"),
        (Safety.SAFER, CapLatent(ceiling=1.0), "less of latent 3"),
        (Safety.LESS_SAFE, SetLatent(target=9.0), "more of latent 3"),
        (Safety.LESS_SAFE, SetLatent(target=0.0), None),
        (Safety.LESS_SAFE, CapLatent(ceiling=1.0), None),
        (Safety.NEUTRAL, SetLatent(target=9.0), None),
    ],
)
def test_what_may_make_the_model_less_safe_needs_leave(
    more_is: Safety | None, operator: Operator, refused: str | None
) -> None:
    latent = LatentSteer(stored_sae(random_sae()), 3, more_is)
    found = latent.unsafe(operator)
    assert (found is None) == (refused is None)
    assert refused is None or refused in str(found)
    assert SetLatent(target=0.0).signs == {Sign.LESS}


STEER = "name: calm, sae: sae.safetensors, latent: 3, op: set_latent, target: 2, more_is: neutral, max_dose: 9"


def policy(tmp_path: Path, entry: str) -> Path:
    sae = random_sae()
    save_sae(tmp_path / "sae.safetensors", sae, stored_sae(sae).card)
    saved_artifact(tmp_path, make_card())
    rules = rule("watch", action="steer, steer: calm, gate: latched", when="aggregate: {kind: max}, above: {value: 1}")
    text = policy_text(rules, head=f"steers:\n  - {{{entry}}}\n")
    return write_policy(tmp_path, text).path


def test_a_latent_in_a_policy_file_is_a_steer(tmp_path: Path) -> None:
    plan = check_policy(policy(tmp_path, STEER))
    (steer,) = plan.steering.steers
    assert (steer.tap, steer.strength, steer.unit) == (Tap(1), 1.0, 8.0)
    wanted = steer_of(random_sae(), 3, SetLatent(target=2.0), max_dose=9.0)
    np.testing.assert_array_equal(steer.update.read, wanted.update.read)
    assert steer.update.constant == pytest.approx(2 * np.linalg.norm(random_sae().decoder[3]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (STEER.replace("more_is: neutral, ", ""), r"steers\[0\]: nobody has said .* allow_safety_reducing: true"),
        (STEER.replace("latent: 3", "latent: 12"), "latent 12 does not exist"),
        (STEER.replace("latent: 3, ", ""), "'sae' and 'latent' stand together"),
        (STEER.replace("set_latent", "cap"), "'target' is not a key of a steer with op: cap"),
        (STEER.replace("set_latent, target: 2", "cap"), "does not write to a latent. Known: cap_latent, set_latent"),
        (STEER.replace("target: 2", "target: -2"), "'target': Input should be greater than or equal to 0"),
        (STEER.replace("sae: sae.safetensors, latent: 3", "artifact: x.safetensors"), "'more_is' is said of a latent"),
        (f"{STEER}, artifact: x.safetensors", "exactly one of 'artifact' and 'sae'"),
        ("name: calm, artifact: x.safetensors, op: set_latent, target: 1", "does not write along a direction"),
    ],
)
def test_a_mistake_in_the_policy_file_is_told(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        check_policy(policy(tmp_path, entry))


def test_an_operator_of_latents_needs_one() -> None:
    vector = LatentSteer(stored_sae(random_sae()), 3, Safety.NEUTRAL).steering_vector()
    assert np.linalg.norm(vector.direction) == pytest.approx(1)
    plain = type(vector)(vector.direction, median_norm=1.0, mean=0.0, ceiling=0.0)
    with pytest.raises(SteerError, match="name one with 'sae' and 'latent'"):
        SetLatent(target=1.0).update(plain, max_dose=1.0)
    assert not Cap.of_latent


def test_a_latent_opens_a_gate_in_the_pass(tmp_path: Path) -> None:
    """A threshold below that of the autoencoder is no lower a bar than the latent's own."""
    sae = random_sae(3)
    save_sae(tmp_path / "sae.safetensors", sae, stored_sae(sae).card)
    own = float(sae.threshold[7])
    for stated, limit in ((own / 2, own), (own + 1, own + 1)):
        watched = f"name: hot, kind: sae_latent, sae: sae.safetensors, latents: [7], threshold: {{value: {stated}}}"
        rules = rule("watch", detector="hot", action="steer, steer: calm, gate: token", stage="stream")
        text = policy_text(rules, head=f"steers:\n  - {{{STEER}}}\n", names=())
        text = text.replace("detectors:\n", f"detectors:\n  - {{{watched}}}\n")
        (gate,) = check_policy(write_policy(tmp_path, text).path).steering.gates
        found = gate.limit(Format.CHAT)
        assert found == pytest.approx(limit)
    several = text.replace("latents: [7]", "latents: [7, 2], combine: max")
    with pytest.raises(PolicyError, match="computed behind the pass"):
        check_policy(write_policy(tmp_path, several).path)
