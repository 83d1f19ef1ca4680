"""Every kind of detector: served as directions and arithmetic, it gives what its definition gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from sklearn.covariance import EmpiricalCovariance
from sklearn.neural_network import MLPClassifier

from monitor.canary import canary_prompts
from monitor.monitor import Monitor, StepReadouts
from monitor.policy import Plan
from monitor.segments import PromptMap, Run
from monitor.types import Role
from monitor.yaml_file import PolicyError
from probes.aggregate.max import Max
from probes.artifact import Artifact, ArtifactError
from probes.bank import Bank
from probes.card import Canary, Card, Format, Stage
from probes.detectors import detector_kinds, load_detector, unfit_aggregate
from probes.taps import Tap
from tests.support.kinds import AGGREGATE, HEADS, LAYERS, MAKE, Tensors, novelty
from tests.unit.artifacts import D_MODEL, NUM_LAYERS, calibration, make_card, plan_of, policy_text, rule

Float32 = npt.NDArray[np.float32]
TOLERANCE = 1e-5
"""Of the scale: the products are float32, as the engine's are."""


each_kind = pytest.mark.parametrize("kind", sorted(MAKE))


def artifact_of(kind: str, rng: np.random.Generator, *, name: str | None = None, **card: object) -> Artifact:
    tensors = {key: np.asarray(value, dtype=np.float32) for key, value in MAKE[kind](rng, D_MODEL).items()}
    made = make_card(name or kind, kind=kind, layers=LAYERS.get(kind, (1,)), **card)  # type: ignore[arg-type]
    return Artifact(Path(f"{made.name}.safetensors"), made, tensors)


def engine_reads(bank: Bank, streams: Mapping[Tap, Float32]) -> Float32:
    """What the engine computes: true float32 products, then the squared norm."""
    parts: list[Float32] = []
    for matrix in bank.matrices:
        stream = streams[matrix.tap]
        parts += [stream @ matrix.weight + matrix.bias, np.square(stream).sum(axis=1, keepdims=True)]
    return np.concatenate(parts, axis=1)


def streams_of(rng: np.random.Generator, rows: int) -> dict[Tap, Float32]:
    return {Tap(layer): (rng.standard_normal((rows, D_MODEL)) * 4).astype(np.float32) for layer in range(NUM_LAYERS)}


def test_every_kind_is_tested_here() -> None:
    assert set(MAKE) == set(detector_kinds())


def test_the_bank_gives_each_detector_what_it_gives_alone() -> None:
    """All kinds in one bank, two of each, read in float32 as an engine does."""
    rng = np.random.default_rng(0)
    detectors = [load_detector(artifact_of(kind, rng, name=f"{kind}_{i}")) for i in range(2) for kind in sorted(MAKE)]
    bank = Bank(detectors, d_model=D_MODEL, num_layers=NUM_LAYERS, capacity=64)
    streams = streams_of(rng, 50)
    fused = bank.score(engine_reads(bank, streams))
    assert fused.shape == (50, bank.num_scores)
    assert bank.num_scores == sum(detector.channels for detector in detectors)
    for detector in detectors:
        alone = detector.score(detector.read(streams)).reshape(50, -1)
        first = bank.index[detector.name]
        found = fused[:, first : first + detector.channels]
        assert np.abs(found - alone).max() <= TOLERANCE * (1 + np.abs(alone).max()), detector.name


@each_kind
def test_a_tensor_that_is_missing_or_misshapen_is_refused(kind: str) -> None:
    whole = artifact_of(kind, np.random.default_rng(1))
    for name, tensor in whole.tensors.items():
        left = {key: value for key, value in whole.tensors.items() if key != name}
        with pytest.raises(ArtifactError, match=f"'{name}' is missing"):
            load_detector(Artifact(whole.path, whole.card, left))
        with pytest.raises(ArtifactError, match=f"'{name}' has the shape"):
            load_detector(Artifact(whole.path, whole.card, {**whole.tensors, name: tensor[None]}))
        broken = np.where(np.arange(tensor.size).reshape(tensor.shape) == 0, np.nan, tensor)
        with pytest.raises(ArtifactError, match=f"'{name}' holds NaN"):
            load_detector(Artifact(whole.path, whole.card, {**whole.tensors, name: broken}))


@each_kind
def test_a_kind_of_one_tap_is_given_one(kind: str) -> None:
    whole = artifact_of(kind, np.random.default_rng(1))
    several = make_card(kind, kind=kind, layers=(0, 1, 2))
    with pytest.raises(ArtifactError, match="reads one tap" if kind != "ensemble" else "has the shape"):
        load_detector(Artifact(whole.path, several, whole.tensors))


def test_an_ensemble_is_its_members_weighed() -> None:
    rng = np.random.default_rng(2)
    artifact = artifact_of("ensemble", rng)
    streams = streams_of(rng, 20)
    expected = np.zeros(20)
    for place, layer in enumerate(LAYERS["ensemble"]):
        tensors = {key: artifact.tensors[key][place] for key in ("direction", "mean", "scale")}
        tensors["bias"] = artifact.tensors["bias"][[place]]
        member = load_detector(Artifact(Path("m.safetensors"), make_card("m", layers=(layer,)), tensors))
        expected += artifact.tensors["share"][place] * member.score(member.read(streams))
    detector = load_detector(artifact)
    assert np.allclose(detector.score(detector.read(streams)), expected, rtol=0, atol=1e-9)


def test_an_mlp_is_sklearns() -> None:
    """A ring that no direction separates; the served score is the logit of ``MLPClassifier``."""
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((600, D_MODEL))
    labels = np.hypot(inputs[:, 0], inputs[:, 1]) > 1.2
    model = MLPClassifier((16,), max_iter=400, random_state=0).fit(inputs, labels)
    tensors: Tensors = {
        "mean": np.zeros(D_MODEL),
        "scale": np.ones(D_MODEL),
        "hidden": model.coefs_[0].T,
        "hidden_bias": model.intercepts_[0],
        "out": model.coefs_[1][:, 0],
        "out_bias": model.intercepts_[1],
    }
    detector = load_detector(Artifact(Path("m.safetensors"), make_card("m", kind="mlp"), tensors))
    found = detector.score(detector.read({Tap(0): inputs}))
    probabilities = model.predict_proba(inputs)[:, 1]
    assert np.allclose(1 / (1 + np.exp(-found)), probabilities, rtol=0, atol=1e-9)


def test_novelty_is_a_mahalanobis_distance_and_chi_squared_on_what_it_was_fitted_on() -> None:
    rng = np.random.default_rng(4)
    tensors = novelty(rng, D_MODEL)
    components, variance = tensors["components"], tensors["variance"]
    covariance = components.T @ np.diag(variance - 0.5) @ components + 0.5 * np.eye(D_MODEL)
    rows = rng.multivariate_normal(tensors["mean"], covariance, size=4000)
    detector = load_detector(Artifact(Path("n.safetensors"), make_card("n", kind="novelty"), tensors))
    found = detector.score(detector.read({Tap(0): rows})) * D_MODEL
    whole = EmpiricalCovariance(store_precision=True)
    whole.location_, whole.covariance_, whole.precision_ = tensors["mean"], covariance, np.linalg.inv(covariance)
    assert np.allclose(found, whole.mahalanobis(rows), rtol=1e-7)
    assert stats.kstest(found, stats.chi2(D_MODEL).cdf).pvalue > 0.01
    assert stats.kstest(found * 1.1, stats.chi2(D_MODEL).cdf).pvalue < 0.01


@pytest.mark.parametrize(
    "components", [np.eye(D_MODEL), np.ones((2, D_MODEL)), 2 * np.eye(D_MODEL)[:2]], ids=["all", "parallel", "long"]
)
def test_components_that_are_none_are_refused(components: npt.NDArray[np.float64]) -> None:
    tensors = {
        **novelty(np.random.default_rng(5), D_MODEL),
        "components": components,
        "variance": np.ones(len(components)),
    }
    with pytest.raises(ArtifactError, match="perpendicular"):
        load_detector(Artifact(Path("n.safetensors"), make_card("n", kind="novelty"), tensors))


def test_attention_is_a_softmax_over_the_tokens() -> None:
    rng = np.random.default_rng(6)
    artifact = artifact_of("attention", rng)
    detector = load_detector(artifact)
    rows = torch.tensor(rng.standard_normal((37, D_MODEL)) * 4)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in artifact.tensors.items()}
    z = (rows - tensors["mean"]) / tensors["scale"]
    weights = torch.softmax(z @ tensors["query"].T, dim=0)
    expected = float((weights * (z @ tensors["value"].T + tensors["bias"])).sum())
    scores = detector.score(detector.read({Tap(1): rows.numpy()}))
    aggregate = AGGREGATE["attention"]
    found = aggregate.update(aggregate.new_state(1, 1), scores[:, None])
    assert found[-1, 0, 0] == pytest.approx(expected, abs=1e-9)


def served(plan: Plan, rows: Float32, cuts: Sequence[int], prompt: PromptMap, num_prompt: int) -> list[float]:
    """Statistics of every check, fed in pieces beside another request with other rows."""
    monitor = Monitor(plan)
    mate = np.random.default_rng(99).standard_normal(rows.shape).astype(np.float32)
    for name in ("a", "mate"):
        monitor.admit(name, num_prompt=num_prompt, policy=None, fmt=Format.CHAT, prompt=prompt)
    for start, end in pairwise(cuts):
        count = end - start
        counts = np.array([count, count], dtype=np.int64)
        positions = np.tile(np.arange(start, end, dtype=np.int64), 2)
        parts = np.concatenate([rows[start:end], mate[start:end]])
        readouts = engine_reads(plan.bank, dict.fromkeys(plan.bank.taps, parts))
        monitor.observe(StepReadouts(["a", "mate"], counts, np.array([0, count], dtype=np.int64), positions, readouts))
    ended = monitor.finish("a", num_positions=len(rows) + 1, sampled=len(rows) + 1 - num_prompt, aborted=False)
    assert ended is not None
    return [float(value) for value in ended.statistics]


@each_kind
def test_served_in_pieces_is_the_offline_statistic(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    aggregate = AGGREGATE.get(kind, Max())
    calibrations = [calibration(stage, aggregate=aggregate, threshold=1e9) for stage in Stage]
    artifact = artifact_of(kind, rng, calibrations=calibrations)
    rules = [rule(stage.value, detector=kind, stage=stage.value, action="flag") for stage in Stage]
    plan = plan_of(tmp_path, policy_text("\n".join(rules), names=[kind]), {kind: artifact})
    rows = rng.standard_normal((20, D_MODEL)).astype(np.float32)
    prompt = PromptMap((Run(Role.USER, 8),), stream_from=8)
    detector = load_detector(artifact)
    scores = detector.score(detector.read(dict.fromkeys(plan.bank.taps, rows))).reshape(20, -1)

    def statistic(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return aggregate.update(aggregate.new_state(1, 1), values[:, None])[:, 0, 0]

    before = 1 if aggregate.reads_before else 0
    said = statistic(scores[8 - before :])
    by_stage = {Stage.PROMPT: statistic(scores[1:8])[-1], Stage.STREAM: said.max(), Stage.RESPONSE: said[-1]}
    expected = [by_stage[check.stage] for check in plan.checks]
    for cuts in ([0, 8, *range(9, 21)], [0, 3, 4, 8, 9, 15, 20], [0, 20]):
        found = served(plan, rows, cuts, prompt, 8)
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-4), (kind, cuts)


def test_drift_is_measured_from_the_row_before_the_segment(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    artifact = artifact_of("drift", rng)
    when = "segments: [tool], aggregate: {kind: delta}, above: {value: 1e6}"
    plan = plan_of(
        tmp_path, policy_text(rule("moved", detector="drift", when=when), names=["drift"]), {"drift": artifact}
    )
    rows = rng.standard_normal((12, D_MODEL)).astype(np.float32)
    runs = (Run(Role.USER, 4), Run(Role.TEMPLATE, 2), Run(Role.TOOL, 3), Run(Role.USER, 3))
    weight = artifact.tensors["direction"] / artifact.tensors["scale"]
    expected = (rows[8] - rows[5]) @ weight
    for cuts in ([0, 12], [0, 6, 12], [0, 5, 6, 7, 12]):
        (found,) = served(plan, rows, cuts, PromptMap(runs, stream_from=12), 12)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "aggregate", "message"),
    [
        ("attention", "{kind: max}", "gives 6 number.s. a token for the aggregate 'attention' alone"),
        ("attention", "{kind: attention, heads: 2}", "attention.heads=2. does not go with"),
        ("multimax", "{kind: attention, heads: 3}", "for the aggregate 'multimax' alone"),
        ("drift", "{kind: mean}", "for the aggregate 'delta' alone"),
        ("linear", "{kind: multimax, heads: 2}", "does not take the one number"),
    ],
)
def test_an_aggregate_that_does_not_fit_is_refused(kind: str, aggregate: str, message: str, tmp_path: Path) -> None:
    artifact = artifact_of(kind, np.random.default_rng(9))
    text = rule("r", detector=kind, when=f"aggregate: {aggregate}, above: {{value: 1}}")
    with pytest.raises(PolicyError, match=message):
        plan_of(tmp_path, policy_text(text, names=[kind]), {kind: artifact})
    calibrated = artifact.card.model_copy(update={"calibrations": (calibration(aggregate=Max()),)})
    if kind != "linear":
        with pytest.raises(ArtifactError, match="the calibration at prompt"):
            load_detector(Artifact(artifact.path, calibrated, artifact.tensors))


@pytest.mark.parametrize(
    ("when", "may"),
    [
        ("all: [ODD, HARM]", True),
        ("all: [{any: [ODD, HARM]}, HARM]", True),
        ("not: HARM", True),
        ("any: [ODD, HARM]", False),
        ("all: [ODD, ODD]", False),
        ("all: [ODD, {not: HARM}]", False),
        ("all: [{any: [ODD, HARM]}, ODD]", False),
    ],
)
def test_the_unusual_counts_beside_the_harmful(tmp_path: Path, when: str, may: bool) -> None:
    artifacts = {
        name: artifact_of(kind, np.random.default_rng(10)) for name, kind in (("odd", "novelty"), ("harm", "linear"))
    }
    for name in artifacts:
        verdict = f"{{detector: {name}, stage: prompt, aggregate: {{kind: mean}}, above: {{value: 3}}}}"
        when = when.replace(name.upper(), verdict)
    text = policy_text(f"{{name: r, when: {{{when}}}, do: {{action: block}}, mode: enforce}}", names=["odd", "harm"])
    if may:
        plan_of(tmp_path, text, artifacts)
        return
    with pytest.raises(PolicyError, match="the rule may fire by 'odd' alone"):
        plan_of(tmp_path, text, artifacts)


def test_nothing_is_blocked_for_being_unusual(tmp_path: Path) -> None:
    artifact = artifact_of("novelty", np.random.default_rng(10))
    when = "aggregate: {kind: mean}, above: {value: 3}"
    plan_of(
        tmp_path,
        policy_text(rule("odd", detector="novelty", when=when, action="flag"), names=["novelty"]),
        {"novelty": artifact},
    )
    with pytest.raises(PolicyError, match="finds what is unusual and not what is harmful"):
        plan_of(
            tmp_path, policy_text(rule("odd", detector="novelty", when=when), names=["novelty"]), {"novelty": artifact}
        )


def with_canary(artifact: Artifact, scores: Sequence[float]) -> Artifact:
    canary = Canary(tokens=tuple(range(9)), scores=tuple(scores), tolerance=0.1, reference="by hand")
    card: Card = artifact.card.model_copy(update={"canary": canary})
    return Artifact(artifact.path, card, artifact.tensors)


def test_a_canary_compares_every_channel() -> None:
    artifact = artifact_of("multimax", np.random.default_rng(11))
    known = np.arange(24, dtype=np.float64).reshape(8, HEADS)
    card = with_canary(artifact, known.ravel().tolist()).card
    (prompt,) = canary_prompts({"other": make_card("other"), "multimax": card}, {"other": 0, "multimax": 1}, vocab=50)
    scores = np.zeros((9, 1 + HEADS))
    scores[1:, 1:] = known
    seen = np.ones(9, dtype=bool)
    assert prompt.compare(scores, seen) is None
    for position in range(1, 9):
        for column in range(1, 1 + HEADS):
            wrong = scores.copy()
            wrong[position, column] += 0.2
            failed = prompt.compare(wrong, seen)
            assert failed is not None
            assert f"'multimax' at position {position}:" in failed.detail


def test_a_canary_with_too_few_numbers_is_refused() -> None:
    artifact = artifact_of("multimax", np.random.default_rng(12))
    assert load_detector(with_canary(artifact, [0.0] * 24)).channels == HEADS
    with pytest.raises(ArtifactError, match="the canary has 8 scores; 24 are due"):
        load_detector(with_canary(artifact, [0.0] * 8))


@each_kind
def test_a_detector_gives_as_many_numbers_as_it_says(kind: str) -> None:
    rng = np.random.default_rng(13)
    detector = load_detector(artifact_of(kind, rng))
    found = detector.score(detector.read(streams_of(rng, 5)))
    assert found.shape == ((5,) if detector.channels == 1 else (5, detector.channels))
    assert unfit_aggregate(detector, AGGREGATE.get(kind, Max())) == ""
