"""``telltale policy test``."""

from __future__ import annotations

from pathlib import Path

import typer

from monitor.trial.cases import read_cases
from monitor.trial.replay import Found, Trial
from serving.deployment import check_policy

EXIT_FAILED = 1


def test(file: Path, cases: Path) -> None:
    """Let a policy judge recorded scores, and compare.

    Raises:
        probes.errors.TelltaleError: the policy or a case is wrong.
        typer.Exit: code 1 if a case is not judged as it says.
    """
    trial, wrong = Trial(check_policy(file)), 0
    listed = read_cases(cases).cases
    for case in listed:
        found = trial.run(case, case.recorded(cases.parent))
        lines = found.differing(case.expect)
        typer.echo(f"{'FAILED' if lines else 'ok    '} {case.name}: {_in_words(found)}")
        for line in lines:
            typer.echo(f"         {line}")
        wrong += bool(lines)
    typer.echo(f"{len(listed) - wrong} of {len(listed)} cases as expected")
    if wrong:
        raise typer.Exit(EXIT_FAILED)


def _in_words(found: Found) -> str:
    if found.rule is None:
        return found.action.value
    at = f", at position {found.at}" if found.at is not None else ""
    return f"{found.action.value} by {found.rule} ({found.stage.value if found.stage is not None else ''}{at})"
