"""The next plan of a server that runs: the same checks as at its start, and a place for everything in what is there.

Every process makes it from the same text and the same files, and must come to the same digest. Knows no engine.
"""

from __future__ import annotations

from pathlib import Path

from monitor.policy import Plan, compile_plan
from monitor.reload import RestartNeededError, fitted, require_same_start
from monitor.yaml_file import parse_policy
from probes.columns import NoRoomError, Room
from serving.deployment import Deployment, load_artifacts, load_steers


class NoFreeColumnError(NoRoomError):
    """A policy fits into the server that runs as soon as requests under older ones have ended."""


def redeploy(started: Deployment, text: str, *, path: Path, room: Room, needed: Room) -> Deployment:
    """Join another policy with the model that is served.

    Args:
        started: what the server was started with.
        text: of the policy file.
        path: what paths in it are relative to, and what it is called in messages.
        room: what is free.
        needed: what would be free if no request ran under an older policy than the newest.
    Raises:
        monitor.yaml_file.PolicyError: the policy is wrong, in the words of ``telltale check``.
        probes.errors.TelltaleError: an artifact is missing, damaged or of another model, or too much is to be read.
        monitor.reload.RestartNeededError: the policy is sound, and needs another start.
        NoFreeColumnError: it is sound, and has to wait.
    """
    file = parse_policy(path, text)
    require_same_start(started.file.config, file.config)
    artifacts, steers = load_artifacts(file), load_steers(file)
    for artifact in (*artifacts.values(), *steers.values()):
        artifact.require_model(started.model)

    def compiled(within: Room | None) -> Plan:
        model = started.model
        return compile_plan(file, artifacts, steers, d_model=model.d_model, num_layers=model.num_layers, room=within)

    try:
        plan = compiled(room)
    except NoRoomError as error:
        # Is it a mistake, does it need a restart, or only patience?
        compiled(None)
        try:
            compiled(needed)
        except NoRoomError as lasting:
            raise RestartNeededError(lasting.setting, str(lasting)) from error
        raise NoFreeColumnError(error.setting, f"{error} Try again then.") from error
    return Deployment(file, artifacts, started.model, fitted(plan, started.plan), started.explainer)
