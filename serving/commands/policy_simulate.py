"""``telltale policy simulate``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from monitor.audit.store import Store
from monitor.events import Decision
from monitor.simulation_tally import PolicyCount, SimulationTally, action_of, mode_of
from monitor.types import Action
from probes.errors import TelltaleError, did_you_mean
from serving.deployment import check_policy
from serving.trail import open_reader

_AGE = re.compile(r"([1-9][0-9]{0,5})(m|h|d)")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_UNKNOWN = "cannot be told"


class SimulationError(TelltaleError, ValueError):
    """A policy cannot be tried as asked."""


def simulate(
    policy: Path, *, source: str | None, since: str | None, until: str | None, only: str | None, as_json: bool
) -> None:
    """Try a policy on what an audit trail has recorded, and print what would have been different.

    Args:
        policy: the policy file.
        source: URL of the trail; None: that of the policy file.
        since: begin of the period; None: with the first record.
        until: its end; None: with the last.
        only: name of a policy of the file that all requests are tried with; None: each with the one it had.
        as_json: print JSON in the place of tables.
    Raises:
        SimulationError: a time cannot be read, there is no such policy, or the period holds no decision.
        monitor.audit.errors.AuditError: there is no trail.
        probes.errors.TelltaleError: the policy file or an artifact is wrong.
    """
    begin, end = _moment("--since", since), _moment("--until", until)
    plan = check_policy(policy)
    names = [one.name for one in plan.policies]
    if only is not None and only not in names:
        raise SimulationError(f"--policy {only}: {policy} has none of that name. {did_you_mean(only, names)}")
    tally, looked_at = SimulationTally(plan, only), 0
    with open_reader(policy, url=source) as store:
        for event in _decisions(store, begin, end):
            looked_at += 1
            tally.take(event)
    if not looked_at:
        raise SimulationError("the trail holds no decision of that period. Give another --from, --since or --until.")
    if as_json:
        sys.stdout.write(json.dumps(_as_json(tally, looked_at), indent=2) + "\n")
    else:
        _show(tally, looked_at)


def _decisions(store: Store, begin: datetime | None, end: datetime | None) -> Iterator[Decision]:
    for writer in store.writers():
        for stored in store.read(writer):
            event = stored.event
            if not isinstance(event, Decision):
                continue
            if (begin is None or event.time >= begin) and (end is None or event.time < end):
                yield event


def _moment(option: str, text: str | None) -> datetime | None:
    """A time, or so long before now; without a zone it is UTC."""
    if text is None:
        return None
    if (age := _AGE.fullmatch(text)) is not None:
        return datetime.now(UTC) - timedelta(**{_UNITS[age[2]]: int(age[1])})
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise SimulationError(
            f"{option} {text}: is no time. Give one as 2026-11-23T08:00 (UTC unless it says otherwise), or an age as "
            "24h or 7d."
        ) from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _show(tally: SimulationTally, looked_at: int) -> None:
    console = Console()
    for count in tally.counts:
        console.print(_rules(count))
        for line in _reasons(count):
            console.print(line, markup=False, highlight=False)
        console.print(_actions(count))
        if count.steered:
            console.print(
                f"{count.steered} of these requests were steered: their replies are judged as they were written."
            )
    for name, number in sorted(tally.without_policy.items()):
        console.print(f"{number} requests had the policy {name!r}, which this file does not have.", markup=False)
    console.print(f"{looked_at} requests looked at")


def _rules(count: PolicyCount) -> Table:
    table = Table(title=f"policy {count.policy.name}, {count.requests} requests", title_justify="left")
    for column in ("rule", "does", "mode"):
        table.add_column(column, overflow="fold")
    for column in ("would have", "did", "more", "fewer", _UNKNOWN):
        table.add_column(column, justify="right")
    for name, rule in count.rules.items():
        numbers = (rule.would, rule.did, rule.more, rule.fewer, rule.unknown)
        does, mode = action_of(count.policy, name).value, mode_of(count.policy, name).value
        table.add_row(name, does, mode, *(str(number) for number in numbers))
    return table


def _reasons(count: PolicyCount) -> Iterator[str]:
    for name, rule in count.rules.items():
        for what, number in rule.why.most_common():
            yield f"{name}: {number} {_UNKNOWN}, {what}"


def _actions(count: PolicyCount) -> Table:
    """Recorded actions in rows, what would have been done in columns."""
    columns = [*_used(action for _, action in count.actions), None]
    table = Table(title="was done, would have been done", title_justify="left")
    table.add_column("")
    for action in columns:
        table.add_column(action.value if action is not None else _UNKNOWN, justify="right")
    for row in _used(action for action, _ in count.actions):
        table.add_row(row.value, *(str(count.actions[row, action]) for action in columns))
    return table


def _used(actions: Iterable[Action | None]) -> list[Action]:
    found = set(actions)
    return [action for action in Action if action in found]


def _as_json(tally: SimulationTally, looked_at: int) -> dict[str, Any]:
    return {
        "requests": looked_at,
        "without_policy": dict(sorted(tally.without_policy.items())),
        "policies": [_policy_as_json(count) for count in tally.counts],
    }


def _policy_as_json(count: PolicyCount) -> dict[str, Any]:
    return {
        "policy": count.policy.name,
        "requests": count.requests,
        "steered": count.steered,
        "rules": [
            {
                "rule": name,
                "action": action_of(count.policy, name).value,
                "mode": mode_of(count.policy, name).value,
                "would_have": rule.would,
                "did": rule.did,
                "more": rule.more,
                "fewer": rule.fewer,
                "cannot_be_told": rule.unknown,
                "why": dict(rule.why.most_common()),
            }
            for name, rule in count.rules.items()
        ],
        "actions": [
            {"was": was.value, "would_have_been": would.value if would is not None else None, "requests": number}
            for (was, would), number in count.actions.items()
        ],
    }
