"""``telltale check``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from monitor.access import Door, KeyScope
from monitor.audit.settings import AuditSettings
from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.condition import verdicts_of
from monitor.config import Config
from monitor.explain import ExplainSettings
from monitor.flag_alert import FlagAlert
from monitor.policy import Plan
from monitor.rollout import Subject
from monitor.rule import Gate
from monitor.session import Conversation
from monitor.sessions.settings import SessionSettings
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
        _show(compiled, plan, console)
    for tenant in plan.tenants.values():
        console.print(f"tenant {tenant.name}: {_gets(tenant)}", markup=False, highlight=False)
    shares = [rule.share for compiled in plan.policies for rule in compiled.rules if rule.share is not None]
    if not plan.tenants and any(share.by is not Subject.REQUEST for share in shares):
        console.print(
            "rollout without tenants: API keys that the server knows are told apart; without any the whole server is "
            "one tenant."
        )
    config = read_policy_file(policy).config
    for line in _access(config):
        console.print(line, markup=False, highlight=False)
    console.print(_audit(config.audit))
    if config.explain is not None:
        console.print(_explains(config.explain), markup=False, highlight=False)
    for alert in plan.alerts:
        console.print(f"alert: {_alerts(alert)}", markup=False, highlight=False)
    if unsampled := _without_quantiles(plan):
        console.print(
            f"drift cannot be told of {', '.join(unsampled)}: their cards hold no quantiles of the calibration; "
            "telltale calibrate adds them."
        )
    if any(compiled.conversations for compiled in plan.policies):
        console.print(_sessions(config.sessions))
    for sink in config.sinks:
        console.print(_sink(sink), markup=False, highlight=False)
    if without := sorted(name for name, card in plan.cards.items() if card.canary is None):
        console.print(
            f"without a canary: {', '.join(without)}. That they are read at every token is proved, not that their "
            "scores are right; telltale canary ARTIFACT adds one."
        )
    console.print(f"ok: {policy} reads {', '.join(str(tap) for tap in plan.bank.taps)}; plan {plan.digest[:16]}")


def _show(compiled: CompiledPolicy, plan: Plan, console: Console) -> None:
    """A policy's rules as a table and in words, and what else it says."""
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
        if rule.conversation is not None:
            table.add_row(rule.name, *_over_requests(rule.conversation, plan), *said[1:])
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


def _alerts(alert: FlagAlert) -> str:
    """What an alert watches, and from when on it tells."""
    of = f" of policy {alert.policy}" if alert.policy else ""
    return f"{alert.watched.value} {', '.join(alert.names)}{of}: {alert.entry.in_words()}"


def _without_quantiles(plan: Plan) -> list[str]:
    """Calibrated detectors whose live statistics nothing can be compared with."""
    return sorted(
        name
        for name, card in plan.cards.items()
        if card.calibrations and not any(calibration.quantiles for calibration in card.calibrations)
    )


def _gets(tenant: CompiledTenant) -> str:
    """Which policy a tenant's requests get."""
    gets = [f"policy {tenant.policy}"]
    gets += [f"{policy} for the model {model!r}" for model, policy in (tenant.by_model or {}).items()]
    gets += [f"{policy} if a proxy says {name!r}" for name, policy in tenant.by_header.items()]
    return ", ".join(gets)


def _access(config: Config) -> Iterator[str]:
    """Who gets an answer."""
    access = config.access
    for key in access.keys:
        yield f"key {key.name}: {', '.join(key.scopes)}"
    keyed = config.tenants or any(KeyScope.INFER in key.scopes for key in access.keys)
    said = access.inference or (Door.KEYED if keyed else None)
    inference = said.value if said is not None else "open on the loopback address, keyed by VLLM_API_KEY elsewhere"
    metrics = access.metrics.value if access.metrics is not None else "open on the loopback address, keyed elsewhere"
    limit = f"{access.requests_per_minute} requests a minute" if access.requests_per_minute else "no limit of requests"
    yield f"access: inference {inference}; metrics {metrics}; {limit}; bodies up to {access.body_bytes} bytes"


def _explains(settings: ExplainSettings) -> str:
    return (
        f"explain: {settings.tokens} tokens of a request on which a rule fired, {settings.top} latents each, by "
        f"{settings.sae}; at most {settings.per_minute} requests a minute, each computed twice more"
    )


def _over_requests(conversation: Conversation, plan: Plan) -> tuple[str, str, str]:
    """What a rule over conversations reads, its statistic and its threshold."""
    read = plan.checks[conversation.check]
    statistic = f"{conversation.accumulator} of {read.statistic} at {read.stage.value}"
    return read.detector, statistic, f"> {conversation.threshold:.4g}"


def _sessions(settings: SessionSettings) -> str:
    if settings.url is None:
        return (
            f"sessions: in memory, of one process; {settings.per_tenant} of a tenant, {settings.total} in all, each "
            f"until {settings.idle} after its last request"
        )
    return (
        f"sessions: in a database, {settings.per_tenant} of a tenant, each until {settings.idle} after its last "
        f"request; while it cannot be reached: {settings.on_failure}"
    )


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
    if rule.conversation is not None:
        begins = "the next requests"
    elif rule.gate is not None:
        latched = plan.steering.gates[rule.gate].kind is Gate.LATCHED
        begins = "in the pass, behind the row" if latched else "in the pass, the row alone"
    elif rule.mode is Mode.SHADOW:
        begins = "nothing, in shadow"
    return f"{rule.action.value} {_writes(plan.steering.steers[rule.steer])} ({begins})"


def _writes(steer: Steer) -> str:
    return f"{steer.name} after {steer.tap}, {steer.positions.value}"
