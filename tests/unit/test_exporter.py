"""Metrics: exact counts after a scripted run, nothing outside the catalogue, no label that a request could invent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from monitor.audit.metrics import AuditMetrics
from monitor.canary import CanaryFailure
from monitor.catalogue import CATALOGUE, MetricType
from monitor.events import Event
from monitor.explain_metrics import ExplainMetrics, Outcome
from monitor.exporter import Exporter
from monitor.monitor import Monitor
from monitor.policy import Plan
from monitor.report import make_report, take_tally
from monitor.rollout import Subjects
from monitor.sessions.metrics import Operation, SessionMetrics
from monitor.sinks.delivery import Failure
from monitor.sinks.metrics import SinkMetrics
from monitor.tenant_metrics import NOBODY
from monitor.types import RESERVED_RULES, Action, Gap, Mode, Phase, PromptEvent, ReloadOutcome, Skip
from probes.card import Calibration, Format, Stage
from serving.api.access_metrics import AccessMetrics
from serving.api.probing import ProbingWatch
from serving.api.refusal import Reason
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.script import Script, chat

RULES = "\n".join(
    [
        rule("prompt", when="aggregate: {kind: max}, above: {value: 1.0}", action="flag"),
        rule("stream", stage="stream", when="aggregate: {kind: max}, above: {value: 2.0}"),
        rule("watch", stage="stream", when="aggregate: {kind: mean}, above: {value: 2.0}", mode="shadow"),
        rule("promised", mode="shadow"),
    ]
)
QUANTILES = tuple(np.linspace(-1.0, 1.4, 101).tolist())


def calibrated() -> Calibration:
    """A threshold, and the benign statistics that it was read from."""
    return calibration(threshold=1.5).model_copy(update={"quantiles": QUANTILES})


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    artifacts = {
        "harm": unit_artifact(make_card(skip_first=1, calibrations=[calibrated()])),
        "watched": unit_artifact(make_card("watched", calibrations=[calibration(threshold=1.5)]), 1),
    }
    return plan_of(tmp_path, policy_text(RULES, names=["harm", "watched"]), artifacts)


SINKS = ("oncall", "siem")


class Run:
    """A scripted run into a registry; scores are those of the first detector, any other sees 0.5."""

    def __init__(self, plan: Plan, *, columns: int = 2) -> None:
        self.columns = columns
        self.registry = CollectorRegistry()
        self.exporter = Exporter(plan, self.registry)
        AuditMetrics(self.registry)
        AccessMetrics(self.registry)
        SinkMetrics(self.registry, SINKS).delivered("oncall", 0.5)
        ExplainMetrics(self.registry)
        SessionMetrics(self.registry)
        ProbingWatch(lambda: plan, self.registry)
        self.monitor, self.script = Monitor(plan), Script(plan)

    def request(
        self, name: str, prompt: list[float], reply: list[float], *, broken: bool = False, tenant: str = ""
    ) -> None:
        """One whole request, one report a step."""
        known = chat(len(prompt))
        self.monitor.admit(
            name, num_prompt=len(prompt), policy=None, fmt=Format.CHAT, prompt=known, subjects=Subjects(tenant)
        )
        for start, scores in ((0, prompt), *((len(prompt) + n, [score]) for n, score in enumerate(reply))):
            rows = self.script.rows([[score, 0.5][: self.columns] for score in scores])
            self.monitor.observe(self.script.step([(name, range(start, start + len(scores)), rows)]))
            going = self.monitor.get(name)
            assert going is not None
            self.exporter.record(make_report(self.monitor, [going], [], take_tally(self.monitor, [1e-4])))
        positions = len(prompt) + len(reply) + 1 + (3 if broken else 0)
        ended = self.monitor.finish(name, num_positions=positions, sampled=positions - len(prompt), aborted=False)
        assert ended is not None
        self.exporter.record(make_report(self.monitor, [], [ended], take_tally(self.monitor, [])))
        self.exporter.record(make_report(self.monitor, [], [], None))

    def value(self, name: str, **labels: str) -> float | None:
        by_policy = ("telltale_requests_total", "telltale_actions_total", "telltale_detector_threshold")
        return self.registry.get_sample_value(name, labels | ({"policy": "default"} if name in by_policy else {}))


def test_counts_are_exact(plan: Plan) -> None:
    run = Run(plan)
    run.request("allowed", [0, 0.5], [0.5, 0.25])
    run.request("flagged", [0, 1.5, 0], [])
    run.request("blocked", [0, 1.25], [0, 3.0])
    run.request("torn", [0, 0], [0.0], broken=True)
    assert [run.value("telltale_requests_total", action=action.value) for action in Action] == [1, 2, 0, 0, 0, 0, 1]
    acted = {
        (rule_name, action, mode): run.value("telltale_actions_total", rule=rule_name, action=action, mode=mode)
        for rule_name, action, mode in [
            ("prompt", "flag", "enforce"),
            ("stream", "block", "enforce"),
            ("watch", "block", "shadow"),
            ("on_gap", "flag", "enforce"),
        ]
    }
    assert list(acted.values()) == [2, 1, 0, 1]
    assert run.value("telltale_tokens_scored_total") == 3 + 2 + 3 + 2
    assert run.value("telltale_tokens_skipped_total", reason="sink") == 4
    assert run.value("telltale_tokens_skipped_total", reason="final") == 4
    assert [run.value("telltale_gaps_total", reason=gap.value) for gap in Gap] == [3, 0, 0, 0, 0, 0]
    assert run.value("telltale_observe_seconds_count") == 3 + 1 + 3 + 2
    assert run.value("telltale_observe_seconds_sum") == pytest.approx(9e-4)
    prompt = {"stage": "prompt", "aggregate": "max", "segments": ""}
    assert run.value("telltale_detector_score_count", detector="harm", **prompt) == 4
    # Scores may be negative, so the client library publishes no sum; the buckets say where they lay.
    below = {
        float(sample.labels["le"]): sample.value
        for family in run.registry.collect()
        for sample in family.samples
        if sample.name == "telltale_detector_score_bucket"
        and (sample.labels["detector"], sample.labels["stage"]) == ("harm", "prompt")
    }
    # Thresholds are bounds: the rule's 1.0 and the card's 1.5.
    assert {bound: below[bound] for bound in (1.0, 1.5)} == {1.0: 2, 1.5: 4}
    assert {-1.0, 0.2, 1.4} <= set(below)
    assert run.value("telltale_detector_score_count", detector="watched", **prompt) == 4


def test_a_detector_counts_a_request_once_and_its_delay_by_tokens(plan: Plan) -> None:
    run = Run(plan)
    run.request("all at once", [0, 5.0], [9.0, 0.0])
    run.request("late", [0, 0.5], [0.0, 0.0, 9.0])
    run.request("never", [0, 0.5], [0.0])
    assert run.value("telltale_flagged_requests_total", detector="harm") == 2
    assert run.value("telltale_flagged_requests_total", detector="watched") == 0
    of_max = {"detector": "harm", "aggregate": "max"}
    assert run.value("telltale_detection_delay_tokens_count", **of_max) == 2
    assert run.value("telltale_detection_delay_tokens_sum", **of_max) == 1 + 3
    assert run.value("telltale_artifact_info", detector="harm", kind="linear", digest="0" * 16) == 1


def test_overhead_is_told_by_phase(plan: Plan) -> None:
    run = Run(plan)
    run.monitor.admit("a", num_prompt=2, policy=None, fmt=Format.CHAT, prompt=chat(2))
    run.monitor.observe(run.script.step([("a", range(2), run.script.rows([[0, 0], [0, 0]]))]))
    assert 0 < run.monitor.tally.policy_seconds < 1
    tally = take_tally(run.monitor, [3e-4], {"observe": [2e-4], "policy": [1e-4]}, 7)
    run.exporter.record(make_report(run.monitor, [], [], tally))
    run.exporter.took(4e-4)
    spent = {phase: run.value("telltale_overhead_seconds_sum", phase=phase.value) for phase in Phase}
    assert spent == {
        Phase.TAP: 0,
        Phase.TRANSFER: 0,
        Phase.OBSERVE: 2e-4,
        Phase.POLICY: 1e-4,
        Phase.REPORT: 0,
        Phase.API: 4e-4,
    }
    assert run.value("telltale_held_back_outputs") == 7


def test_drift_is_told_once_there_is_enough_and_acts_on_nobody(plan: Plan) -> None:
    where = {"detector": "harm", "stage": "prompt", "aggregate": "max", "segments": "", "format": "chat"}
    rng, run = np.random.default_rng(0), Run(plan)
    for number in range(199):
        run.request(f"as ever {number}", [0, float(rng.uniform(-1.0, 1.4))], [])
    assert run.value("telltale_score_psi", **where) is None
    for number in range(199, 300):
        run.request(f"as ever {number}", [0, float(rng.uniform(-1.0, 1.4))], [])
    assert 0 <= (run.value("telltale_score_psi", **where) or 0) < 0.2
    assert (run.value("telltale_score_ks", **where) or 1) < 0.15
    assert run.value("telltale_score_psi", **where | {"detector": "watched"}) is None
    before = run.value("telltale_requests_total", action="allow")
    for number in range(400):
        run.request(f"moved {number}", [0, -3.0], [])
    assert (run.value("telltale_score_psi", **where) or 0) > 0.25
    assert (run.value("telltale_score_ks", **where) or 0) > 0.5
    assert run.value("telltale_requests_total", action="allow") == (before or 0) + 400


def test_a_rule_that_fires_more_than_was_promised(plan: Plan) -> None:
    of_rule = {"rule": "promised", "format": "chat", "policy": "default"}
    run = Run(plan)
    for number in range(30):
        run.request(f"quiet {number}", [0, 0.0], [])
    assert run.registry.get_sample_value("telltale_alarm_rate_exceeded_total", of_rule) == 0
    for number in range(30):
        run.request(f"loud {number}", [0, 9.0], [])
    assert (run.registry.get_sample_value("telltale_alarm_rate_exceeded_total", of_rule) or 0) >= 1
    # The rule "prompt" states a number: nothing was promised of it.
    promised = {sample.labels["rule"] for family in run.registry.collect() for sample in family.samples
                if sample.name == "telltale_alarm_rate_evidence"}  # fmt: skip
    assert promised == {"promised"}


def test_series_that_matter_start_at_zero(plan: Plan) -> None:
    run = Run(plan)
    assert all(run.value("telltale_requests_total", action=action.value) == 0 for action in Action)
    assert all(run.value("telltale_gaps_total", reason=gap.value) == 0 for gap in Gap)
    assert all(run.value("telltale_tokens_skipped_total", reason=skip.value) == 0 for skip in Skip)
    assert run.value("telltale_actions_total", rule="watch", action="block", mode="shadow") == 0
    assert all(run.value("telltale_prompt_events_total", event=event.value) == 0 for event in PromptEvent)
    assert run.value("telltale_unsigned_requests_total") == 0
    assert run.value("telltale_ready") == 0
    assert all(run.value("telltale_canary_failures_total", reason=reason.value) == 0 for reason in CanaryFailure)


@pytest.mark.covers("canary: corrupted weights", "not ready meanwhile")
def test_a_failing_canary_ends_readiness_until_one_passes(plan: Plan) -> None:
    run = Run(plan)
    run.exporter.canary_passed(0.05)
    assert (run.value("telltale_ready"), run.value("telltale_canary_ok")) == (1, 1)
    assert run.value("telltale_canary_seconds") == 0.05
    passed_at = run.value("telltale_canary_last_success_timestamp_seconds")
    run.exporter.canary_failed(CanaryFailure.WRONG_SCORES)
    assert (run.value("telltale_ready"), run.value("telltale_canary_ok")) == (0, 0)
    assert run.value("telltale_canary_failures_total", reason="wrong_scores") == 1
    assert run.value("telltale_canary_last_success_timestamp_seconds") == passed_at
    run.exporter.canary_passed(0.06)
    assert (run.value("telltale_ready"), run.value("telltale_canary_ok")) == (1, 1)
    assert run.value("telltale_canary_last_success_timestamp_seconds") > passed_at


def test_thresholds_and_the_plan_can_be_read(plan: Plan) -> None:
    run = Run(plan)
    assert run.value("telltale_detector_threshold", rule="", detector="watched", stage="prompt", format="chat") == 1.5
    assert run.value("telltale_policy_info", digest=plan.digest[:16]) == 1


def test_every_metric_is_in_the_catalogue_with_its_labels(plan: Plan) -> None:
    run = Run(plan)
    run.request("blocked", [0, 1.25], [0, 3.0], broken=True)
    by_name = {metric.name.removesuffix("_total"): metric for metric in CATALOGUE}
    families = {family.name: family for family in run.registry.collect()}
    assert set(families) == set(by_name)
    for name, family in families.items():
        metric = by_name[name]
        assert (family.type, family.documentation) == (metric.type.value, metric.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)


def test_labels_are_bounded_by_the_plan(plan: Plan) -> None:
    """Whatever requests are called and do, no series comes that the policy file did not foresee."""
    run = Run(plan)
    for number in range(5):
        whose = f"sha256:{number}"
        run.request(f"anything {number} \n", [0.0, 9.0], [float("nan"), 9.0], broken=True, tenant=whose)
    rules = {entry.name for policy in plan.policies for entry in policy.rules} | {"", *RESERVED_RULES}
    allowed = {
        "action": {action.value for action in Action},
        "rule": rules,
        "mode": {mode.value for mode in Mode},
        "detector": set(plan.cards),
        "stage": {stage.value for stage in Stage},
        "aggregate": {str(check.aggregate) for check in plan.checks},
        "format": {fmt.value for fmt in Format},
        "reason": {reason.value for reason in (*Gap, *Skip, *CanaryFailure, *Reason, *Failure)},
        "sink": set(SINKS),
        "named": {"yes", "no"},
        "operation": {operation.value for operation in Operation},
        "event": {event.value for event in PromptEvent},
        "segments": {",".join(check.segments or ()) for check in plan.checks},
        "digest": {plan.digest[:16], *(card.tensors_digest[:16] for card in plan.cards.values())},
        "outcome": {outcome.value for kind in (Outcome, ReloadOutcome) for outcome in kind},
        "phase": {phase.value for phase in Phase},
        "tenant": {NOBODY},
        "policy": {policy.name for policy in plan.policies},
        "kind": {kind.model_fields["kind"].default for kind in get_args(Event)} | {"linear"},
    }
    for family in run.registry.collect():
        for sample in family.samples:
            for label, value in sample.labels.items():
                assert label == "le" or value in allowed[label]


def test_the_catalogue_follows_the_naming_rules() -> None:
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert re.fullmatch(r"telltale_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.type is MetricType.COUNTER)
        assert bool(metric.buckets) == (metric.type is MetricType.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help.endswith(".")


def test_another_plan_takes_over_thresholds_and_digest_and_nothing_that_was_counted(plan: Plan, tmp_path: Path) -> None:
    run = Run(plan)
    run.request("a", [0.0, 9.0], [9.0])
    card = make_card("other", calibrations=[calibration(threshold=7.0)])
    other = plan_of(
        tmp_path, policy_text(rule("new", detector="other"), names=["other"]), {"other": unit_artifact(card)}
    )
    before = run.registry.get_sample_value("telltale_tokens_scored_total")
    run.exporter.hold({plan.digest: plan, other.digest: other})
    run.exporter.adopt(other)
    run.exporter.reloaded(ReloadOutcome.APPLIED)
    infos = {
        sample.labels["digest"]: sample.value
        for family in run.registry.collect()
        for sample in family.samples
        if sample.name == "telltale_policy_info"
    }
    assert infos == {other.digest[:16]: 1}
    thresholds = [
        (sample.labels["detector"], sample.value)
        for family in run.registry.collect()
        for sample in family.samples
        if sample.name == "telltale_detector_threshold"
    ]
    assert set(thresholds) == {("other", 7.0)}
    assert run.registry.get_sample_value("telltale_tokens_scored_total") == before
    assert run.registry.get_sample_value("telltale_policy_reloads_total", {"outcome": "applied"}) == 1
    run.request("b", [0.0, 9.0], [9.0])  # under the plan that it began with
    assert (run.registry.get_sample_value("telltale_tokens_scored_total") or 0) > (before or 0)
