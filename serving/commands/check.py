"""``telltale check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from monitor.audit.settings import AuditSettings
from monitor.compiled import CompiledRule
from monitor.condition import verdicts_of
from monitor.policy import Plan
from monitor.rollout import Subject
from monitor.rule import Gate
from monitor.sinks.settings import SinkEntry, SinkEvent
from monitor.tenants import CompiledTenant
from monitor.types import Action, Mode
from monitor.verdicts import AnyCheck
from monitor.yaml_file import read_policy_file
from probes.card import Format, Stage
from probes.steering.steer import Steer
from serving.commands.explain import explain, share_in_words
from serving.deployment import check_policy


def check(policy: Path) -> None:
    """Check a policy file and say what each of its rules does.

    Raises:
        probes.errors.TelltaleError: the file or an artifact is wrong.
    """
    plan = check_policy(policy)
    console = Console()
    for compiled in plan.policies:
        table = Table(title=f"policy {compiled.name}", title_justify="left")
        for column in ("rule", "reads", "statistic", "threshold", "does", "mode"):
            table.add_column(column, overflow="fold")
        for rule in compiled.rules:
            mode = rule.mode.value if rule.share is None else f"{rule.mode.value} for {share_in_words(rule.share)}"
            said = [rule.name, _does(rule, plan), mode]
            for number, negated in verdicts_of(rule.condition):
                read = plan.checks[number]
                name = f"not {read.detector}" if negated else read.detector
                limits = ", ".join(_limit(read, fmt) for fmt in sorted(read.thresholds))
                table.add_row(said[0], name, f"{read.statistic} at {read.stage.value}", limits, *said[1:])
                said = ["", "", ""]  # the next verdict of the same rule
        console.print(table)
        for rule in compiled.rules:
            console.print(explain(rule, plan), markup=False, highlight=False)
        console.print(
            f"on_gap {compiled.on_gap.value}, on_uncalibrated {compiled.on_uncalibrated.value}, "
            f"hold_back {compiled.hold_back}, expose {compiled.expose.value}"
        )
        for who, numbers in (("every request", compiled.steers), ("who asks for it", compiled.on_request)):
            for number in numbers:
                console.print(f"steers {who}: {_writes(plan.steering.steers[number])}")
    for tenant in plan.tenants.values():
        console.print(f"tenant {tenant.name}: {_gets(tenant)}", markup=False, highlight=False)
    shares = [rule.share for compiled in plan.policies for rule in compiled.rules if rule.share is not None]
    if not plan.tenants and any(share.by is not Subject.REQUEST for share in shares):
        console.print(
            "rollout without tenants: API keys that vLLM asks for (--api-key) are told apart; without any the whole "
            "server is one tenant."
        )
    config = read_policy_file(policy).config
    console.print(_audit(config.audit))
    for sink in config.sinks:
        console.print(_sink(sink), markup=False, highlight=False)
    if without := sorted(name for name, card in plan.cards.items() if card.canary is None):
        console.print(
            f"without a canary: {', '.join(without)}. That they are read at every token is proved, not that their "
            "scores are right; telltale canary ARTIFACT adds one."
        )
    console.print(f"ok: {policy} reads {', '.join(str(tap) for tap in plan.bank.taps)}; plan {plan.digest[:16]}")


def _gets(tenant: CompiledTenant) -> str:
    """Which policy a tenant's requests get."""
    gets = [f"policy {tenant.policy}"]
    gets += [f"{policy} for the model {model!r}" for model, policy in (tenant.by_model or {}).items()]
    gets += [f"{policy} if a proxy says {name!r}" for name, policy in tenant.by_header.items()]
    return ", ".join(gets)


def _audit(settings: AuditSettings | None) -> str:
    if settings is None:
        return "audit: none; no event is written down"
    url = settings.url.rpartition("@")
    shown = f"{url[0].partition('//')[0]}//...@{url[2]}" if url[0] else settings.url
    return (
        f"audit: {shown}, texts {settings.text.value}, {settings.durability.value}; while it cannot be written "
        f"{'nothing is released' if settings.blocks_on_error else 'traffic goes on'}"
    )


def _sink(sink: SinkEntry) -> str:
    """What is sent to a sink, and how often it is tried."""
    told = [event.value for event in sink.events]
    if SinkEvent.DECISION in sink.events:
        told[told.index(SinkEvent.DECISION.value)] = f"decisions from {sink.min_action.value} on" + (
            ", in shadow too" if sink.shadow else ""
        )
    only = [f"only of {key} {', '.join(names)}" for key, names in _named(sink) if names]
    texts = "with texts" if sink.text else "no texts"
    return f"sink {sink.name} ({sink.kind.value}): {'; '.join([*told, *only, texts])}; {sink.tries} tries"


def _named(sink: SinkEntry) -> tuple[tuple[str, Sequence[str]], ...]:
    return ("rules", sink.rules or ()), ("detectors", sink.detectors or ())


def _limit(check: AnyCheck, fmt: Format) -> str:
    """Above which the check fires in a format, at each length."""
    limits = check.by_length.get(fmt)
    if limits is None:
        return f"{fmt.value} > {check.thresholds[fmt]:.4g}"
    parts = [f"{value:.4g} up to {end} tokens" for end, value in zip(limits.ends, limits.values, strict=False)]
    return f"{fmt.value} > {'; '.join([*parts, f'{limits.values[-1]:.4g} beyond'])}"


def _does(rule: CompiledRule, plan: Plan) -> str:
    if rule.action is Action.BLOCK and rule.rests_on(Stage.STREAM, plan.checks):
        return f"{rule.action.value} (ends the stream at that token)"
    if rule.steer is None:
        return rule.action.value
    begins = "from the next step on"
    if rule.gate is not None:
        latched = plan.steering.gates[rule.gate].kind is Gate.LATCHED
        begins = "in the pass, behind the row" if latched else "in the pass, the row alone"
    elif rule.mode is Mode.SHADOW:
        begins = "nothing, in shadow"
    return f"{rule.action.value} {_writes(plan.steering.steers[rule.steer])} ({begins})"


def _writes(steer: Steer) -> str:
    return f"{steer.name} after {steer.tap}, {steer.positions.value}"
