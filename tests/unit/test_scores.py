"""Scores and statistics offline are those of a served request: by hooks on one side, by the monitor on the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from monitor.monitor import Monitor
from monitor.policy import Plan
from monitor.segments import PromptMap
from probes.aggregate import parse_aggregator
from probes.artifact import Artifact, ArtifactError
from probes.card import Format, Stage
from probes.detectors import Detector
from probes.detectors.base import Directions
from probes.fit.reading.activations import ActivationError
from probes.fit.reading.rendered import Rendered
from probes.fit.reading.scores import (
    RequestScores,
    ScoreError,
    open_reader,
    read_scores,
    score_requests,
    statistic_of,
    statistics_of_requests,
)
from probes.fit.rows.example import Example
from probes.modelref import read_model_ref
from probes.taps import Site, Tap
from tests.support.words import D_MODEL, activations_by_hooks
from tests.unit.artifacts import linear_tensors, make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.script import Script, chat

EXAMPLES = [
    Example(text="please bake the bread", label=0, source="s", group="a", response="how can i bake"),
    Example(text="steal money", label=1, source="s", group="b", response="now"),
    Example(text="write a plan for the party today alone quickly", label=0, source="s", group="c", response="a plan"),
]


def linear(model_dir: Path, cache: Path, *, layer: int, seed: int, skip_first: int = 1) -> Artifact:
    model = read_model_ref(model_dir, model_id="words", dtype="float32", cache_dir=cache)
    card = make_card(f"d{seed}", layers=(layer,), skip_first=skip_first, model=model)
    direction = np.random.default_rng(seed).standard_normal(D_MODEL)
    return Artifact(Path(f"d{seed}.safetensors"), card, linear_tensors(direction, bias=0.5))


@pytest.mark.parametrize("text_format", list(Format))
@pytest.mark.parametrize("stage", list(Stage))
def test_scores_are_those_of_a_plain_forward_pass(
    model_dir: Path, tmp_path: Path, text_format: Format, stage: Stage
) -> None:
    artifacts = [linear(model_dir, tmp_path, layer=0, seed=1), linear(model_dir, tmp_path, layer=2, seed=2)]
    told: list[str] = []
    model = artifacts[0].card.model
    reader = open_reader(artifacts, model_dir, model=model, cache_dir=tmp_path, progress=told.append)

    def read() -> list[list[RequestScores]]:
        return read_scores(
            artifacts, EXAMPLES, reader, text_format=text_format, stage=stage, cache_dir=tmp_path, label="rows"
        )

    found = read()
    requests = reader.render(EXAMPLES, text_format=text_format, stage=stage)
    for artifact, rows in zip(artifacts, found, strict=True):
        layer = Tap.parse(artifact.card.taps[0]).layer
        for request, row in zip(requests, rows, strict=True):
            first = max(1, request.first)
            plain = activations_by_hooks(model_dir, list(request.tokens))[layer][first:]
            expected = plain.astype(np.float64) @ artifact.tensors["direction"].astype(np.float64) + 0.5
            np.testing.assert_allclose(row.scores, expected, atol=1e-5)
            assert list(row.positions) == list(range(first, len(request.tokens)))
            assert len(row.before) == (first > 1)
    assert len(told) == 1
    again = read()  # from the cache: the model is not run
    assert len(told) == 1
    for rows, repeated in zip(found, again, strict=True):
        for row, copy in zip(rows, repeated, strict=True):
            np.testing.assert_array_equal(row.scores, copy.scores)
            np.testing.assert_array_equal(row.before, copy.before)
            assert row.first == copy.first


def test_the_cache_knows_detector_and_requests(model_dir: Path, tmp_path: Path) -> None:
    one = linear(model_dir, tmp_path, layer=1, seed=1)
    told: list[str] = []
    reader = open_reader([one], model_dir, model=one.card.model, cache_dir=tmp_path, progress=told.append)

    def runs(artifact: Artifact, examples: Sequence[Example] = EXAMPLES, stage: Stage = Stage.PROMPT) -> int:
        before = len(told)
        read_scores(
            [artifact], examples, reader, text_format=Format.CHAT, stage=stage, cache_dir=tmp_path, label="rows"
        )
        return len(told) - before

    assert runs(one) == 1
    renamed = Artifact(one.path, one.card.model_copy(update={"name": "other", "calibrations": ()}), one.tensors)
    assert runs(renamed) == 0
    assert runs(one, EXAMPLES[:2]) == 1
    assert runs(one, stage=Stage.RESPONSE) == 1
    assert runs(Artifact(one.path, one.card.model_copy(update={"skip_first": 2}), one.tensors)) == 1
    assert runs(linear(model_dir, tmp_path, layer=1, seed=3)) == 1


def test_another_model_and_a_tap_too_high_are_refused(model_dir: Path, tmp_path: Path) -> None:
    one = linear(model_dir, tmp_path, layer=0, seed=1)
    with pytest.raises(ArtifactError, match="does not fit"):
        open_reader([unit_artifact(make_card())], model_dir, model=one.card.model, cache_dir=tmp_path, progress=str)
    reader = open_reader([one], model_dir, model=one.card.model, cache_dir=tmp_path, progress=str)
    with pytest.raises(ActivationError, match="up to 0"):
        list(reader.sweep([Rendered((1, 2), 0)], [Tap(1)], label="rows"))


class _TwoSites(Detector):
    """The product of a readout after one layer and one of another layer's MLP: neither linear nor of one tap."""

    kind = "two_sites"
    TAPS = (Tap(0), Tap(2, Site.MLP_OUT))

    @classmethod
    def from_artifact(cls, artifact: Artifact, *, name: str) -> _TwoSites:
        raise NotImplementedError

    def directions(self) -> Sequence[Directions]:
        weights = np.random.default_rng(0).standard_normal((2, D_MODEL, 1))
        return [Directions(tap, weight, np.zeros(1)) for tap, weight in zip(self.TAPS, weights, strict=True)]

    def score(self, readouts: Mapping[Tap, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        first, second = (readouts[tap][:, 0] for tap in self.TAPS)
        return first * second


def test_a_detector_of_several_taps_and_sites(model_dir: Path, tmp_path: Path) -> None:
    one = linear(model_dir, tmp_path, layer=2, seed=1)
    reader = open_reader([one], model_dir, model=one.card.model, cache_dir=tmp_path, progress=str)
    detector = _TwoSites("both")
    requests = reader.render(EXAMPLES, text_format=Format.CHAT, stage=Stage.PROMPT)
    ((*rows,),) = score_requests([detector], requests, reader, skip_first=[1], label="rows")
    weights = [part.weight[:, 0] for part in detector.directions()]
    for request, row in zip(requests, rows, strict=True):
        parts = [
            activations_by_hooks(model_dir, list(request.tokens), tap.site)[tap.layer][1:].astype(np.float64) @ weight
            for tap, weight in zip(detector.TAPS, weights, strict=True)
        ]
        np.testing.assert_allclose(row.scores, parts[0] * parts[1], atol=1e-5)


class _Given:
    """Activations that a test wants; those of the last request may be missing."""

    def __init__(self, values: npt.NDArray[np.float32], missing: int = 0) -> None:
        self.values, self.missing = values, missing

    def sweep(
        self, requests: Sequence[Rendered], taps: Sequence[Tap], *, label: str
    ) -> Iterator[tuple[int, Mapping[Tap, npt.NDArray[np.float32]]]]:
        for number in range(len(requests) - self.missing):
            yield number, dict.fromkeys(taps, self.values)


def test_a_nan_and_a_missing_request_are_errors() -> None:
    from probes.detectors import load_detector

    detector = load_detector(unit_artifact(make_card()))
    values = np.ones((3, 8), dtype=np.float32)
    requests = [Rendered((1, 2, 3), 0)] * 2
    with pytest.raises(ScoreError, match="missing"):
        score_requests([detector], requests, _Given(values, missing=1), skip_first=[1], label="rows")
    values[2, 0] = np.nan
    with pytest.raises(ScoreError, match="1 scores of request 0 are NaN"):
        score_requests([detector], requests, _Given(values), skip_first=[1], label="rows")
    values[:] = [[np.nan], [1], [1]]  # the sink is not read
    found = score_requests([detector], requests, _Given(values), skip_first=[1], label="rows")
    assert [list(row.scores) for row in found[0]] == [[1.0, 1.0]] * 2


AGGREGATES = ("last", "mean", "max", "topk, k: 3", "ema, alpha: 0.3", "rolling, window: 3", "cusum, drift: 0.1",
              "delta", "delta, of: max")  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    rules = [
        rule(f"r{number}-{stage.value}", stage=stage.value, action="flag",
             when=f"aggregate: {{kind: {aggregate}}}, above: {{value: 1e9}}")
        for number, aggregate in enumerate(AGGREGATES)
        for stage in Stage
    ]  # fmt: skip
    artifact = unit_artifact(make_card(skip_first=1))
    return plan_of(tmp_path_factory.mktemp("plan"), policy_text("\n".join(rules)), {"harm": artifact})


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_prompt=st.integers(1, 9),
    num_reply=st.integers(0, 9),
    text_format=st.sampled_from(Format),
)
def test_the_statistic_is_the_served_one(
    plan: Plan, seed: int, num_prompt: int, num_reply: int, text_format: Format
) -> None:
    """A request runs through the monitor, prompt first and then token by token; offline has its rows at once."""
    scores = np.random.default_rng(seed).standard_normal(num_prompt + num_reply).astype(np.float32)
    monitor, script = Monitor(plan), Script(plan)
    prompt = chat(num_prompt) if text_format is Format.CHAT else PromptMap.raw(num_prompt)
    monitor.admit("a", num_prompt=num_prompt, policy=None, fmt=text_format, prompt=prompt)
    monitor.observe(script.step([("a", range(num_prompt), script.rows(scores[:num_prompt]))]))
    for position in range(num_prompt, len(scores)):
        monitor.observe(script.step([("a", [position], script.rows(scores[position : position + 1]))]))
    sampled = num_reply + 1
    ended = monitor.finish("a", num_positions=len(scores) + 1, sampled=sampled, aborted=False)
    assert ended is not None
    for check, served in zip(plan.checks, ended.statistics, strict=True):
        length = num_prompt if check.stage is Stage.PROMPT else len(scores)
        first = num_prompt if check.stage is not Stage.PROMPT and text_format is Format.CHAT else 0
        positions = Rendered(tuple(range(length)), first).positions(check.skip_first)
        begin = int(positions[0]) if len(positions) else length
        before = scores[begin - 1 : begin] if begin > check.skip_first else scores[:0]
        offline = statistic_of(
            check.aggregate, check.stage, scores[positions].astype(np.float64), before=before.astype(np.float64)
        )
        assert offline == served or abs(offline - served) < 1e-12


def test_statistics_of_many_requests() -> None:
    largest = parse_aggregator({"kind": "max"})
    empty, three = RequestScores(np.zeros(0), 1), RequestScores(np.array([1.0, 3.0, 2.0]), 1)
    assert list(statistics_of_requests(largest, Stage.PROMPT, [empty, three])) == [-np.inf, 3.0]
    newest = parse_aggregator({"kind": "last"})
    assert list(statistics_of_requests(newest, Stage.RESPONSE, [three])) == [2.0]
    assert list(statistics_of_requests(newest, Stage.STREAM, [three])) == [3.0]
