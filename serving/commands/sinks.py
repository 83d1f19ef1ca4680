"""``telltale sinks``: try the receivers of events, and send again what did not arrive."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from monitor.sinks.settings import SinkEntry

EXIT_FAILED = 1

sinks_app = typer.Typer(
    help="Try the receivers of events, and send again what did not arrive.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_Policy = Annotated[Path, typer.Argument(help="Policy file with 'sinks'.", show_default=False)]
_Names = Annotated[list[str] | None, typer.Option("--sink", help="Only this one; may be repeated.")]


@sinks_app.command("test")
def try_out(policy: _Policy, names: _Names = None) -> None:
    """Send each sink a message that says that it is a test. Exit code 1 if one did not take it."""
    import os

    from monitor.sinks.message import trial_message
    from monitor.sinks.sinks import open_delivery

    failed = False
    for entry in _entries(policy, names or ()):
        delivery = open_delivery(entry, os.environ)
        outcome = delivery.attempt(trial_message(entry.kind, entry.name))
        delivery.close()
        failed |= outcome.failure is not None
        said = "delivered" if outcome.failure is None else f"failed: {outcome.failure.value}, {outcome.detail}"
        sys.stdout.write(f"{entry.name}: {said}\n")
    if failed:
        raise typer.Exit(EXIT_FAILED)


@sinks_app.command()
def replay(policy: _Policy, names: _Names = None) -> None:
    """Send dead letters again. Exit code 1 if some are left."""
    import os

    from monitor.sinks.dead_letters import DeadLetters
    from monitor.sinks.replay import replay as run
    from monitor.sinks.sinks import open_delivery

    left = 0
    for entry in _entries(policy, names or ()):
        box = DeadLetters(Path(entry.dead_letters))
        mine = [letter for letter in box.all() if letter.sink == entry.name]
        delivery = open_delivery(entry, os.environ)
        found = run(mine, delivery, box)
        delivery.close()
        left += found.left
        why = f" ({found.failure.detail})" if found.failure is not None else ""
        sys.stdout.write(f"{entry.name}: {found.delivered} delivered, {found.left} left{why}\n")
    if left:
        raise typer.Exit(EXIT_FAILED)


def _entries(policy: Path, names: Sequence[str]) -> list[SinkEntry]:
    """The sinks of a policy file, or some of them.

    Raises:
        monitor.yaml_file.PolicyError: the file is wrong.
        monitor.sinks.errors.SinkError: it has none of that name, or none at all.
    """
    from monitor.sinks.errors import SinkError
    from monitor.yaml_file import read_policy_file
    from probes.errors import did_you_mean

    entries = {entry.name: entry.resolved(policy.absolute().parent) for entry in read_policy_file(policy).config.sinks}
    if not entries:
        raise SinkError(f"{policy}: has no 'sinks'. Add some: sinks: [{{name: oncall, kind: slack, url_env: ...}}].")
    for name in names:
        if name not in entries:
            raise SinkError(f"--sink {name}: {policy} has none of that name. {did_you_mean(name, entries)}")
    return [entry for name, entry in entries.items() if not names or name in names]
