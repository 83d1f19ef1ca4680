"""The steers of a policy file made ready: joined with their directions, and refused where they would spoil a rule."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from monitor.config import Config, Policy, Rule
from monitor.gates import SteerGate
from monitor.types import Mode
from monitor.yaml_file import Place, PolicyFile
from probes.card import Card, Stage
from probes.errors import did_you_mean
from probes.steering import SteerError
from probes.steering.steer import Positions, Steer, Steerable, SteerMatrix, make_steer, stack_steers
from probes.taps import Tap


@dataclass(frozen=True, slots=True)
class SteerPlan:
    """All that may be written.

    Attributes:
        steers: in the order of the policy file.
        matrices: what the engine multiplies with, one for each layer that is written to.
        index: a steer's position, by its name.
        gates: conditions on single rows that switch on steers in the pass.
    """

    steers: tuple[Steer, ...]
    matrices: tuple[SteerMatrix, ...]
    index: Mapping[str, int]
    gates: tuple[SteerGate, ...] = ()

    def digest(self) -> str:
        """SHA-256 over all steers."""
        content = ",".join(f"{steer.name}:{steer.digest()}" for steer in self.steers)
        return hashlib.sha256(content.encode()).hexdigest()

    def number(self, file: PolicyFile, where: Place, name: str) -> int:
        """Position of the steer that a key of the file names.

        Raises:
            PolicyError: it is not known.
        """
        if name not in self.index:
            raise file.error(where, f"is {name!r}. {did_you_mean(name, self.index)}")
        return self.index[name]


def compile_steers(file: PolicyFile, artifacts: Mapping[str, Steerable], *, d_model: int, num_layers: int) -> SteerPlan:
    """Join the steers of a policy file with their directions.

    Args:
        file: the validated policy file.
        artifacts: by the names of its steers.
        d_model: width of the served model's residual stream.
        num_layers: its decoder layers.
    Raises:
        PolicyError: a steer cannot be used as the file says.
        probes.artifact.ArtifactError: an artifact is damaged.
    """
    config: Config = file.config
    steers = []
    for number, entry in enumerate(config.steers):
        try:
            steer = make_steer(
                entry.name,
                artifacts[entry.name],
                entry.operator(),
                positions=entry.positions,
                max_dose=entry.max_dose,
                allow_safety_reducing=entry.allow_safety_reducing,
            )
            stack_steers([steer], d_model=d_model, num_layers=num_layers)
        except SteerError as error:
            raise file.error(("steers", number), str(error)) from error
        steers.append(steer)
    matrices = stack_steers(steers, d_model=d_model, num_layers=num_layers)
    index = MappingProxyType({steer.name: number for number, steer in enumerate(steers)})
    return SteerPlan(tuple(steers), matrices, index)


def steer_of_rule(file: PolicyFile, where: Place, rule: Rule, plan: SteerPlan) -> int | None:
    """Position of the steer that a rule applies; None if it steers nothing.

    Raises:
        PolicyError: the steer is not known.
    """
    return plan.number(file, (*where, "do", "steer"), rule.do.steer) if rule.do.steer is not None else None


def require_clean_readings(
    file: PolicyFile, where: Place, policy: Policy, cards: Mapping[str, Card], plan: SteerPlan
) -> None:
    """Refuse an enforcing rule that would read rows which a steer of its policy has changed.

    No card says how its detector behaves under a steer, so a threshold there has no known rate.

    Raises:
        PolicyError: names rule and steer.
    """
    named = {*policy.steers, *policy.on_request, *(rule.do.steer for rule in policy.rules if rule.do.steer is not None)}
    steers = [plan.steers[plan.index[name]] for name in sorted(named)]
    for number, rule in enumerate(policy.rules):
        if rule.mode is not Mode.ENFORCE:
            continue
        read = [Tap.parse(tap) for tap in cards[rule.when.detector].taps]
        for steer in steers:
            if rule.when.stage is Stage.PROMPT and steer.positions is Positions.GENERATED:
                continue
            if any(tap.layer > steer.tap.layer for tap in read):
                raise file.error(
                    (*where, "rules", number, "when", "detector"),
                    f"is {rule.when.detector!r}, which reads {', '.join(map(str, read))}, above the steer "
                    f"{steer.name!r} after {steer.tap}: it would judge what the steer has written, for which it is not "
                    "calibrated. Steer after a layer at or above the detector's, judge at the stage 'prompt' and steer "
                    "positions: generated, or set mode: shadow.",
                )
