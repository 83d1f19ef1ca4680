"""Explanations behind replies: bounded, rated, counted, and never a reason for anything else to wait or to end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from monitor.check import Check
from monitor.events import Content, Explanation
from monitor.explain_metrics import ExplainMetrics, Outcome
from monitor.report import Decided, Trail
from monitor.types import Role
from monitor.yaml_file import PolicyError, read_policy_file
from probes.aggregate.max import Max
from probes.artifact import ArtifactError
from probes.card import Format, Stage
from probes.sae.file import save_sae
from probes.taps import Tap
from serving.deployment import Deployment
from serving.engine.explanations import Explanations
from serving.engine.flagged import Flagged, flagged_by, read_positions
from serving.engine.frontend import Frontend
from serving.engine.pick_order import PICKS, PickedRows
from serving.engine.readouts import WorkerReadouts
from serving.engine.records import Record
from serving.engine.rereads import Rereads
from serving.explainer import find_explainer
from tests.unit.artifacts import D_MODEL, calibration, make_card, model_ref, plan_of, policy_text, rule, unit_artifact
from tests.unit.saes import random_sae, stored_sae

PROMPT, TOKENS = 4, 12
SETTINGS = "audit: {}\nexplain: {sae: sae.safetensors, tokens: 2, top: 3, per_minute: 3, queue: 2}\n"


class Engine:
    """A scripted engine around our own scheduler's part: tokens are their own activations, computed in two steps."""

    def __init__(self, deployment: Deployment, frontend: Frontend) -> None:
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(policy="fcfs"), model_config=SimpleNamespace(max_model_len=64)
        )
        self.engine_core = self
        self._bank = deployment.plan.bank
        explain = deployment.file.config.explain
        assert explain is not None
        self.rereads = Rereads(keep=explain.queue, width=self._bank.width)
        self.rows = np.random.default_rng(5).normal(size=(100, D_MODEL)).astype(np.float32)
        self.frontend = frontend
        self.computed: list[list[int]] = []
        self.break_on: Exception | None = None
        self.swap = False

    def flag(self, name: str, tokens: Sequence[int]) -> None:
        """A request with these tokens has ended, and a rule has fired."""
        request = SimpleNamespace(request_id=name, all_token_ids=list(tokens), num_prompt_tokens=PROMPT, client_index=0)
        live = SimpleNamespace(decided={"watch"}, stream_from=PROMPT, roles=None)
        self.rereads.ended(request, SimpleNamespace(request=live, fired=np.array([True])))  # type: ignore[arg-type]

    async def call_utility_all_async(self, _: str, op: str, body: dict[str, str]) -> list[dict[str, Any]]:
        take = {"flagged": self.rereads.take_flagged, "reread": self.rereads.take_result}[op]
        return [{}, take(body["request_id"])]

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> Any:
        if self.break_on is not None:
            raise self.break_on
        tokens = prompt["prompt_token_ids"]
        assert params.max_tokens == 1
        assert prompt["cache_salt"] == request_id
        self.computed.append(tokens)
        positions = self.frontend._rereads[request_id]
        internal = f"{request_id}-0"
        self.frontend._reread_ids[request_id] = internal
        self.rereads.admit(internal, len(tokens), positions)
        for start, stop in ((0, 3), (3, len(tokens))):
            step = SimpleNamespace(num_scheduled_tokens={"someone": 1, internal: stop - start})
            self.rereads.scheduled(step)  # type: ignore[arg-type]
            self.rereads.take(self._read(internal, tokens, start, stop, getattr(step, PICKS, {})))
        self.rereads.finish(internal)
        yield None

    def _read(self, name: str, tokens: Sequence[int], start: int, stop: int, orders: Any) -> WorkerReadouts:
        stream = self.rows[tokens[start:stop]]
        readouts = np.zeros((1 + stop - start, self._bank.width), dtype=np.float32)
        for matrix in self._bank.matrices:
            column = self._bank.norm_column(matrix.tap)
            readouts[1:, column - matrix.weight.shape[1] : column] = stream @ matrix.weight + matrix.bias
            readouts[1:, column] = np.square(stream).sum(axis=1)
        wanted = tuple((name, place) for place in orders.get(name, ()))
        rows = np.full((len(wanted), D_MODEL), np.nan, dtype=np.float32)
        for number, (_, place) in enumerate(wanted):
            if start <= place < stop:
                rows[number] = self.rows[tokens[place] + self.swap]
        return WorkerReadouts(
            request_ids=["someone", name],
            counts=np.array([1, stop - start]),
            positions=np.concatenate([[7], np.arange(start, stop)]),
            readouts=readouts,
            picked=PickedRows(wanted, rows) if wanted else None,
        )


class Case:
    """Explanations over a scripted engine, with a clock of their own."""

    def __init__(self, folder: Path) -> None:
        artifact = unit_artifact(make_card(calibrations=[calibration()]))
        sae = random_sae(2, tap=Tap(0))
        self.sae = save_sae(folder / "sae.safetensors", sae, stored_sae(sae).card)
        text = policy_text(rule("watch", action="flag")) + SETTINGS
        plan = plan_of(folder, text, {"harm": artifact})
        self.plan, self.artifact = plan, artifact
        file = read_policy_file(folder / "telltale.yaml")
        explainer = find_explainer(file, artifact.card.model)
        self.frontend = Frontend()
        deployment = Deployment(file, {"harm": artifact}, artifact.card.model, plan, explainer)
        self.frontend.configure(deployment)
        self.engine = Engine(deployment, self.frontend)
        self.entered: list[tuple[Explanation, Flagged, list[int]]] = []
        self.registry = CollectorRegistry()
        self.explanations = Explanations(
            self.engine,
            self.frontend,
            lambda event, flagged, tokens: self.entered.append((event, flagged, list(tokens))),
            ExplainMetrics(self.registry),
            clock=lambda: 0.0,
        )

    def counted(self, outcome: Outcome) -> float:
        return self.registry.get_sample_value("telltale_explanations_total", {"outcome": outcome.value}) or 0.0

    def flagged(self, name: str, *, at: int | None = None) -> Flagged:
        return Flagged(self.plan, Content(request_id=name), uuid4(), "watch", 0, at, steered=False)

    def run(self, *offered: Flagged, until: int) -> None:
        """Offer these, and watch until so many have been explained or have failed."""

        async def watched() -> None:
            for each in offered:
                self.explanations.offer(each)
            task = asyncio.create_task(self.explanations.watch())
            async with asyncio.timeout(20):
                while self.counted(Outcome.EXPLAINED) + self.counted(Outcome.FAILED) < until:
                    assert not task.done()
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)  # whoever is not to be explained would be by now
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(watched())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_what_is_told_is_the_full_encode_at_the_highest_tokens_that_the_rule_read(case: Case) -> None:
    tokens = list(range(20, 20 + TOKENS))
    case.engine.flag("a", tokens)
    asked = case.flagged("a", at=PROMPT - 1)
    case.run(asked, until=1)
    ((event, of, said),) = case.entered
    assert of is asked
    assert (event.decision, event.sae_digest) == (asked.decision, case.sae.card.tensors_digest)
    scores = case.engine.rows[tokens[:PROMPT], 0]
    best = sorted(1 + np.argsort(-scores[1:])[:2])  # position 0 is a sink
    assert [token.position for token in event.tokens] == best
    assert said == [tokens[place] for place in best]
    sae = case.sae.sae()
    codes = sae.encode(case.engine.rows[said])
    for token, row in zip(event.tokens, codes, strict=True):
        assert token.active == (row > 0).sum()
        assert token.score == pytest.approx(scores[token.position], abs=1e-5)
        parts = row.astype(np.float64) * sae.decoder[:, 0]
        assert token.rest == pytest.approx(scores[token.position] - parts.sum(), abs=1e-4)
        ranked = [latent for latent in np.argsort(-np.abs(parts), kind="stable")[:3] if row[latent] > 0]
        assert [seen.latent for seen in token.latents] == ranked
        for seen in token.latents:
            assert seen.activity == pytest.approx(row[seen.latent], rel=1e-5)
    # Nothing behind the flag was computed again, and the second time nothing behind the last token that is told.
    assert [len(each) for each in case.engine.computed] == [PROMPT, best[-1] + 1]
    assert (case.frontend._rereads, case.frontend._reread_ids) == ({}, {})


def test_of_too_many_the_oldest_are_dropped_and_counted(case: Case) -> None:
    for name in "abcd":
        case.engine.flag(name, range(10, 10 + TOKENS))
    case.run(*(case.flagged(name, at=PROMPT - 1) for name in "abcd"), until=2)
    assert [of.about.request_id for _, of, _ in case.entered] == ["c", "d"]
    assert case.counted(Outcome.DROPPED) == 2


def test_no_more_begin_in_a_minute_than_may(case: Case) -> None:
    """The clock stands still: three may begin, and the fourth waits."""
    for name in "abcd":
        case.engine.flag(name, range(10, 10 + TOKENS))
    case.run(case.flagged("a", at=3), case.flagged("b", at=3), until=2)
    case.run(case.flagged("c", at=3), case.flagged("d", at=3), until=3)
    assert [of.about.request_id for _, of, _ in case.entered] == ["a", "b", "c"]
    assert case.registry.get_sample_value("telltale_explanations_waiting") == 1
    assert case.counted(Outcome.DROPPED) == 0


def test_whatever_fails_costs_one_explanation(case: Case) -> None:
    case.engine.flag("a", range(10, 10 + TOKENS))
    case.engine.break_on = RuntimeError("out of blocks")
    case.run(case.flagged("a", at=3), until=1)
    case.engine.break_on = None
    case.run(case.flagged("gone", at=3), until=2)
    assert case.counted(Outcome.FAILED) == 2
    case.engine.flag("b", range(10, 10 + TOKENS))
    case.run(case.flagged("b", at=3), until=3)
    assert case.counted(Outcome.EXPLAINED) == 1
    assert (case.frontend._rereads, case.frontend._reread_ids) == ({}, {})


def test_what_another_policy_judged_is_not_explained_by_the_columns_of_this_one(case: Case, tmp_path: Path) -> None:
    old = case.flagged("a", at=3)
    case.engine.flag("a", range(10, 10 + TOKENS))
    text = policy_text(rule("watch", action="flag", when="above: {value: 0.5}")) + SETTINGS
    plan = plan_of(tmp_path, text, {"harm": case.artifact})
    case.frontend.adopt(replace(case.frontend.deployment, plan=plan))
    case.run(old, until=1)
    assert (case.counted(Outcome.FAILED), case.entered) == (1, [])


def test_rows_that_the_tap_did_not_read_are_not_explained(case: Case) -> None:
    case.engine.flag("a", range(10, 10 + TOKENS))
    case.engine.swap = True
    case.run(case.flagged("a", at=3), until=1)
    assert (case.counted(Outcome.FAILED), case.entered) == (1, [])


def test_the_engine_keeps_no_more_than_are_waited_for_and_only_what_was_flagged() -> None:
    rereads = Rereads(keep=2, width=4)
    for number in range(30):
        request = SimpleNamespace(
            request_id=f"r{number}", all_token_ids=[1, 2, number], num_prompt_tokens=2, client_index=number % 2
        )
        live = SimpleNamespace(decided={"watch"} if number % 3 else set(), stream_from=2, roles=None)
        ended = SimpleNamespace(request=live, fired=np.array([False]))
        rereads.ended(request, ended)  # type: ignore[arg-type]
    kept = [number for number in range(30) if rereads.take_flagged(f"r{number}")]
    newest = [[n for n in range(30) if n % 3 and n % 2 == client][-10:] for client in range(2)]
    assert kept == sorted(newest[0] + newest[1])
    assert not any(rereads.take_flagged(f"r{number}") for number in range(30))
    nobody = Rereads(keep=0, width=4)
    nobody.ended(request, ended)  # type: ignore[arg-type]
    assert nobody.take_flagged(request.request_id) == {}


@given(
    roles=st.lists(st.sampled_from(list(Role)), min_size=1, max_size=12),
    more=st.integers(0, 5),
    stage=st.sampled_from(list(Stage)),
    segments=st.none() | st.sets(st.sampled_from(list(Role)), min_size=1).map(tuple),
    skip_first=st.integers(0, 3),
    data=st.data(),
)
def test_positions_that_are_read_are_those_of_stage_segments_and_sink(
    *,
    roles: list[Role],
    more: int,
    stage: Stage,
    segments: tuple[Role, ...] | None,
    skip_first: int,
    data: st.DataObject,
) -> None:
    stream_from = data.draw(st.integers(0, len(roles)))
    check = Check("harm", stage, Max(), skip_first, {Format.RAW: 1.0}, segments if stage is Stage.PROMPT else None)
    codes = np.array([role.code for role in roles], dtype=np.uint8)
    found = read_positions(
        check, num_positions=len(roles) + more, num_prompt=len(roles), stream_from=stream_from, roles=codes
    )
    for place in range(len(roles) + more):
        in_stage = place < len(roles) if stage is Stage.PROMPT else place >= stream_from
        in_segment = check.segments is None or (place < len(roles) and roles[place] in check.segments)
        assert (place in found) == (in_stage and in_segment and place >= skip_first)


def test_what_is_explained_is_the_rule_that_decided_and_its_own_detector(tmp_path: Path) -> None:
    artifacts = {
        name: unit_artifact(make_card(name, calibrations=[calibration()]), dimension)
        for dimension, name in enumerate(("harm", "other"))
    }
    rules = "\n".join(
        [
            rule("first", action="flag"),
            rule("second", detector="other", action="block"),
            "{name: neither, when: {not: {detector: harm, stage: prompt}}, do: {action: flag}, mode: enforce}",
        ]
    )
    plan = plan_of(tmp_path, policy_text(rules, names=("harm", "other")), artifacts)
    numbers = {check.detector: number for number, check in enumerate(plan.checks)}
    record = Record(plan)
    record.fired = [True, True]
    record.trail = Trail(["first", "second"], {numbers["harm"]: 5, numbers["other"]: 7})
    record.decided = Decided(1, "second", "")

    def found(*names: str) -> tuple[str, str, int | None] | None:
        of = flagged_by(plan, record, Content(request_id="a"), uuid4(), names)
        return None if of is None else (of.rule, plan.checks[of.check].detector, of.at)

    assert found("first", "second") == ("second", "other", 7)
    assert found("first") == ("first", "harm", 5)
    assert found("on_gap") is None
    # A rule that fires because something was not found has no tokens that made it.
    assert found("neither") is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (SETTINGS.removeprefix("audit: {}\n"), "'explain' needs 'audit'"),
        (SETTINGS.replace("tokens: 2", "tokens: 17"), "tokens"),
        (SETTINGS.replace("sae.safetensors", "builtin:none/none"), "builtin:none/none"),
    ],
)
def test_mistakes_in_the_policy_file_are_said(tmp_path: Path, more: str, said: str) -> None:
    (tmp_path / "telltale.yaml").write_text(policy_text(rule("watch", action="flag")) + more)
    with pytest.raises(PolicyError, match=said):
        find_explainer(read_policy_file(tmp_path / "telltale.yaml"), model_ref())


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    sae = random_sae(2, tap=Tap(0))
    save_sae(tmp_path / "sae.safetensors", sae, stored_sae(sae).card)
    (tmp_path / "telltale.yaml").write_text(policy_text(rule("watch", action="flag")) + SETTINGS)
    with pytest.raises(ArtifactError, match="does not fit the served model"):
        find_explainer(read_policy_file(tmp_path / "telltale.yaml"), model_ref(weight_digest="d" * 64))


def test_what_another_policy_has_flagged_is_not_read_by_this_one(case: Case) -> None:
    """Its directions may stand elsewhere by now, or nowhere."""
    case.engine.flag("a", list(range(20, 20 + TOKENS)))
    asked = case.flagged("a", at=PROMPT - 1)
    case.run(replace(asked, plan=replace(asked.plan, digest="0" * 64)), until=1)
    assert (case.entered, case.counted(Outcome.FAILED)) == ([], 1)
    case.run(asked, until=2)
    assert len(case.entered) == 1
