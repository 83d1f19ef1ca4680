"""Thresholds by length: flat rates where a statistic grows, from the sample to the decision of the monitor."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from pydantic import ValidationError
from scipy.stats import norm
from typer.testing import CliRunner

from monitor.check import Check, LengthLimits
from monitor.monitor import Monitor
from monitor.policy import Plan, compile_plan
from monitor.segments import PromptMap
from monitor.yaml_file import PolicyError
from probes.aggregate.max import Max
from probes.artifact import Artifact
from probes.card import Calibration, Format, LengthBucket, Stage
from probes.fit.calibration.buckets import even_edges, grows_with_length, merged_edges
from probes.fit.calibration.calibrate import calibrate
from probes.fit.rows.example import Example
from probes.steering.artifact import SteerArtifact, save_steer
from probes.threshold import benign_needed
from serving.cli import app
from serving.engine.records import Record
from tests.unit.artifacts import (
    D_MODEL,
    NUM_LAYERS,
    calibration,
    make_card,
    plan_of,
    policy_text,
    rule,
    saved_artifact,
    unit_artifact,
    write_policy,
)
from tests.unit.script import Script, chat
from tests.unit.test_steers import STEER, direction, do

Float64 = npt.NDArray[np.float64]
TARGET = 0.01
NEEDED = benign_needed(TARGET)
SHORTEST, LONGEST = 8, 128


def grown(count: int, seed: int = 0) -> tuple[Float64, npt.NDArray[np.int64]]:
    """Statistics of benign requests, each the largest of as many normal scores as it has tokens."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(np.int64)
    return norm.ppf(rng.random(count) ** (1 / lengths)), lengths


def rate(threshold: Float64, lengths: npt.NDArray[np.int64]) -> Float64:
    """How many benign requests of these lengths really fire."""
    found: Float64 = 1 - norm.cdf(threshold) ** lengths
    return found


def calibrated(statistics: Float64, lengths: npt.NDArray[np.int64], edges: tuple[int, ...]) -> Calibration:
    rows = [Example(text=str(number), label=0, source="s", group=str(number)) for number in range(statistics.size)]
    return calibrate(
        statistics, rows, stage=Stage.PROMPT, text_format=Format.CHAT, aggregate=Max(), target_fpr=TARGET,
        confidence=0.95, lengths=lengths, edges=edges,
    )  # fmt: skip


def test_the_rate_is_flat_in_length_with_buckets_and_not_without() -> None:
    statistics, lengths = grown(32_000, seed=1)
    assert grows_with_length(statistics, lengths)
    edges = even_edges(statistics, lengths, needed=NEEDED)
    found = calibrated(statistics, lengths, edges)
    assert len(found.buckets) == 8
    assert all(bucket.certified for bucket in found.buckets)
    limits = LengthLimits(edges, tuple(bucket.threshold for bucket in found.buckets))
    every = np.arange(SHORTEST, LONGEST)
    flat = rate(np.array([limits.at(int(length)) for length in every]), every)
    assert np.abs(flat - np.mean(flat)).max() <= 0.005
    assert np.mean(flat) <= TARGET
    steep = rate(np.full(every.size, found.threshold), every)
    assert steep[0] < TARGET - 0.005
    assert steep[-1] > TARGET + 0.01


def test_no_buckets_where_nothing_grows() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(8, 256, 5000)
    assert not grows_with_length(rng.standard_normal(5000), lengths)
    assert not grows_with_length(-lengths.astype(float) + rng.standard_normal(5000), lengths)
    assert not grows_with_length(np.zeros(5000), lengths)
    assert not grows_with_length(rng.standard_normal(5000), np.full(5000, 9))
    faint = rng.standard_normal(5000) + 0.0005 * lengths
    assert not grows_with_length(faint, lengths)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(10, 4000), needed=st.integers(1, 400))
def test_every_bucket_has_what_it_needs(seed: int, count: int, needed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(0.05, count)
    statistics = np.where(rng.random(count) < 0.2, -np.inf, rng.standard_normal(count))
    edges = even_edges(statistics, lengths, needed=needed)
    assert list(edges) == sorted(set(edges))
    tokens = lengths[np.isfinite(statistics)]
    sizes = np.histogram(tokens, bins=[-np.inf, *(edge + 0.5 for edge in edges), np.inf])[0]
    assert sizes.sum() == tokens.size
    assert not edges or sizes.min() >= needed
    assert len(edges) < 8


def test_buckets_that_cannot_certify_are_joined() -> None:
    statistics, lengths = np.zeros(900), np.repeat([10, 20, 30, 40], [300, 100, 200, 300])
    assert merged_edges(statistics, lengths, [10, 20, 30], needed=299) == (10, 30)
    assert merged_edges(statistics, lengths, [20, 30], needed=299) == (20,)
    assert merged_edges(statistics, lengths, [5, 10, 40, 99], needed=299) == (10,)
    assert even_edges(statistics[:597], lengths[:597], needed=299) == ()


def test_a_bucket_is_a_calibration_of_its_own() -> None:
    """So one bucket for all lengths would be no buckets."""
    statistics, lengths = grown(2000)
    plain = calibrated(statistics, lengths, ())
    assert plain.buckets == ()
    longer = np.full(400, LONGEST + 1)
    first, rest = calibrated(
        np.concatenate([statistics, np.full(400, 99.0)]), np.concatenate([lengths, longer]), (LONGEST,)
    ).buckets
    assert (first.threshold, first.top_scores, first.num_benign, first.certified) == (
        plain.threshold, plain.top_scores, plain.num_benign, plain.certified,
    )  # fmt: skip
    assert (rest.threshold, rest.num_benign, rest.max_tokens) == (99.0, 400, None)


# --- on the card and in the monitor ---------------------------------------------------------------------------------


def bucketed(stage: Stage, *, certified: bool = True, num_benign: int = 400) -> Calibration:
    plain = calibration(stage, certified=certified)
    parts = [(3, 1.0), (6, 2.0), (None, 3.0)]
    buckets = tuple(
        LengthBucket(
            max_tokens=end, threshold=value, num_benign=num_benign, certified=certified, top_scores=(value, value - 1)
        )
        for end, value in parts
    )
    return plain.model_copy(update={"buckets": buckets})


def expected_limit(length: int) -> float:
    return 1.0 if length <= 3 else 2.0 if length <= 6 else 3.0


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    card = make_card(calibrations=[bucketed(Stage.PROMPT), bucketed(Stage.RESPONSE)], skip_first=1)
    rules = "\n".join([rule("p", action="block"), rule("r", stage="response", action="flag")])
    return plan_of(tmp_path_factory.mktemp("plan"), policy_text(rules), {"harm": unit_artifact(card)})


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_prompt=st.integers(1, 10), num_reply=st.integers(0, 9))
def test_a_request_is_judged_by_its_length(plan: Plan, seed: int, num_prompt: int, num_reply: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 3.5, num_prompt + num_reply).astype(np.float32)
    monitor, script = Monitor(plan), Script(plan)
    stream_from = int(rng.integers(num_prompt + 1))
    prompt = PromptMap(chat(num_prompt).runs, stream_from)
    monitor.admit("a", num_prompt=num_prompt, policy=None, fmt=Format.CHAT, prompt=prompt)
    cut = int(rng.integers(num_prompt + 1))
    for part in (range(cut), range(cut, num_prompt), *([p] for p in range(num_prompt, len(scores)))):
        if len(part):
            monitor.observe(script.step([("a", part, script.rows(scores[list(part)]))]))
            request = monitor.get("a")
            assert request is not None
            so_far = scores[max(stream_from, 1) : part[-1] + 1]
            shown = len(so_far) > 0 and so_far.max() > expected_limit(len(so_far))
            assert bool(monitor.snapshot([request]).fired[0, 1]) == shown
    request = monitor.get("a")
    assert request is not None
    of_prompt, of_reply = scores[1:num_prompt], scores[max(stream_from, 1) :]
    at_prompt = len(of_prompt) > 0 and of_prompt.max() > expected_limit(len(of_prompt))
    at_end = len(of_reply) > 0 and of_reply.max() > expected_limit(len(of_reply))
    assert (request.rule == "p") == at_prompt
    assert bool(monitor.snapshot([request]).fired[0, 1]) == at_end
    ended = monitor.finish("a", num_positions=len(scores) + 1, sampled=num_reply + 1, aborted=False)
    assert ended is not None
    assert [bool(fired) for fired in ended.fired] == [at_prompt, at_end]


def test_slots_are_used_again_with_the_next_requests_limits(plan: Plan) -> None:
    monitor, script = Monitor(plan), Script(plan)
    for number, (length, fires) in enumerate([(9, False), (3, True), (9, False), (6, False), (4, True)]):
        name = str(number)
        monitor.admit(name, num_prompt=length, policy=None, fmt=Format.CHAT, prompt=chat(length))
        monitor.observe(script.step([(name, range(length), script.rows([1.5] * length))]))
        ended = monitor.finish(name, num_positions=length + 1, sampled=1, aborted=False)
        assert ended is not None
        assert bool(ended.fired[0]) is fires


def test_formats_without_buckets_are_judged_as_before(tmp_path: Path) -> None:
    card = make_card(calibrations=[bucketed(Stage.PROMPT), calibration(fmt=Format.RAW, threshold=1.2)])
    mixed = plan_of(tmp_path, policy_text(rule("p")), {"harm": unit_artifact(card)})
    (check,) = mixed.checks
    assert dict(check.thresholds) == {Format.CHAT: 1.0, Format.RAW: 1.2}
    assert dict(check.by_length) == {Format.CHAT: LengthLimits((3, 6), (1.0, 2.0, 3.0))}
    monitor, script = Monitor(mixed), Script(mixed)
    for fmt, blocked in ((Format.RAW, True), (Format.CHAT, False)):
        monitor.admit(fmt.value, num_prompt=9, policy=None, fmt=fmt, prompt=chat(9))
        monitor.observe(script.step([(fmt.value, range(9), script.rows([1.5] * 9))]))
        request = monitor.get(fmt.value)
        assert request is not None
        assert (request.rule == "p") is blocked


def test_one_limit_for_all_lengths_is_a_threshold() -> None:
    def of(limit: float | LengthLimits) -> Check:
        return Check.of("harm", Stage.PROMPT, Max(), skip_first=1, limits={Format.CHAT: limit})

    assert dict(of(LengthLimits((), (1.5,))).thresholds) == dict(of(1.5).thresholds)
    assert {LengthLimits((), (1.5,)).at(length) for length in (0, 1, 10**6)} == {1.5}
    assert of(LengthLimits((4,), (1.5, 2.0))).key() != of(LengthLimits((5,), (1.5, 2.0))).key()


def test_a_rate_is_asked_for_by_length_where_all_lengths_prove_it(tmp_path: Path) -> None:
    def limits(when: str, num_benign: int = 400) -> object:
        card = make_card(calibrations=[bucketed(Stage.PROMPT, num_benign=num_benign)])
        found = plan_of(tmp_path, policy_text(rule("p", when=when)), {"harm": unit_artifact(card)})
        check = found.checks[0]
        return check.by_length.get(Format.CHAT) or check.thresholds[Format.CHAT]

    assert limits("above: {target_fpr: 0.01}") == LengthLimits((3, 6), (1.0, 2.0, 3.0))
    # 400 requests of one length do not prove 0.5 %, the 1,000 of all lengths do.
    assert limits("above: {target_fpr: 0.005}") == 4.0
    assert limits("above: {value: 7}") == 7.0
    with pytest.raises(PolicyError, match="is not certified"):
        card = make_card(calibrations=[bucketed(Stage.PROMPT, certified=False)])
        plan_of(tmp_path, policy_text(rule("p")), {"harm": unit_artifact(card)})


def test_the_digest_sees_the_threshold_of_every_length(tmp_path: Path) -> None:
    def digest(longest: float) -> str:
        whole = bucketed(Stage.PROMPT)
        last = whole.buckets[-1].model_copy(update={"threshold": longest})
        card = make_card(calibrations=[whole.model_copy(update={"buckets": (*whole.buckets[:-1], last)})])
        return plan_of(tmp_path, policy_text(rule("p")), {"harm": unit_artifact(card)}).digest

    assert digest(3.0) == digest(3.0) != digest(3.5)


def test_the_engine_has_no_gate_for_it(tmp_path: Path) -> None:
    """A row opens a gate in the pass itself, where nobody knows the length: the steer begins behind the prompt."""
    save_steer(tmp_path / "calm.safetensors", direction(), np.eye(D_MODEL)[3])
    steer = {"calm": SteerArtifact.load(tmp_path / "calm.safetensors")}
    card = make_card(calibrations=[bucketed(Stage.PROMPT)])

    def compiled(positions: str) -> Plan:
        calm = f"{{name: calm, artifact: calm.safetensors, op: cap, positions: {positions}}}"
        text = policy_text(do("r", STEER, stage="prompt"), head=f"steers: [{calm}]\n")
        file, artifacts = write_policy(tmp_path, text), {"harm": unit_artifact(card)}
        return compile_plan(file, artifacts, steer, d_model=D_MODEL, num_layers=NUM_LAYERS)

    assert compiled("generated").policies[0].rules[0].gate is None
    with pytest.raises(PolicyError, match="threshold depends on the request's length"):
        compiled("all")


def test_people_and_clients_are_told_the_limits(tmp_path: Path) -> None:
    saved_artifact(tmp_path, make_card(calibrations=[bucketed(Stage.PROMPT)]))
    text = policy_text(rule("p"), policy="expose: scores")
    file = write_policy(tmp_path, text)
    said = CliRunner().invoke(app, ["check", str(tmp_path / "telltale.yaml")], env={"COLUMNS": "250"})
    assert "chat > 1 up to 3 tokens; 2 up to 6 tokens; 3 beyond" in " ".join(said.output.split())
    artifacts = {"harm": Artifact.load(tmp_path / "harm.safetensors")}
    record = Record(compile_plan(file, artifacts, d_model=D_MODEL, num_layers=NUM_LAYERS))
    record.fmt = Format.CHAT
    (described,) = record.describe()["detectors"]
    assert described["thresholds_by_length"] == [
        {"max_tokens": 3, "threshold": 1.0}, {"max_tokens": 6, "threshold": 2.0}, {"max_tokens": None, "threshold": 3.0}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "stream"}, "how long a reply will be"),
        ({"buckets": [0]}, "at least two"),
        ({"buckets": [0, 1]}, "the last one without max_tokens"),
        ({"buckets": [1, 0, 2]}, "shortest first"),
    ],
)
def test_buckets_that_make_no_sense(change: dict[str, object], message: str) -> None:
    content = bucketed(Stage.PROMPT).model_dump(mode="json")
    if isinstance(chosen := change.get("buckets"), list):
        change = {"buckets": [content["buckets"][number] for number in chosen]}
    with pytest.raises(ValidationError, match=message):
        Calibration.model_validate(content | change)
    assert Calibration.model_validate(content) == bucketed(Stage.PROMPT)
