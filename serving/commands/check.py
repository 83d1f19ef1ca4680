"""``telltale check``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from monitor.types import Action
from probes.card import Stage
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
            read = plan.checks[rule.check]
            thresholds = ", ".join(f"{fmt.value} > {value:.4g}" for fmt, value in sorted(read.thresholds.items()))
            cost = " (ends the stream at that token)" if _stops_stream(rule.action, read.stage) else ""
            statistic = f"{read.aggregate} at {read.stage.value}"
            table.add_row(rule.name, read.detector, statistic, thresholds, rule.action.value + cost, rule.mode.value)
        console.print(table)
        console.print(
            f"on_gap {compiled.on_gap.value}, on_uncalibrated {compiled.on_uncalibrated.value}, "
            f"hold_back {compiled.hold_back}, expose {compiled.expose.value}"
        )
    if without := sorted(name for name, card in plan.cards.items() if card.canary is None):
        console.print(
            f"without a canary: {', '.join(without)}. That they are read at every token is proved, not that their "
            "scores are right; telltale canary ARTIFACT adds one."
        )
    console.print(f"ok: {policy} reads {', '.join(str(tap) for tap in plan.bank.taps)}")


def _stops_stream(action: Action, stage: Stage) -> bool:
    return action is Action.BLOCK and stage is Stage.STREAM
