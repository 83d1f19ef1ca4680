"""Gates that a single row's score opens: the engine finds them in the very pass that computes the row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from monitor.check import Check
from monitor.config import Gate, Rule
from monitor.types import Mode
from monitor.yaml_file import Place, PolicyFile
from probes.bank import Bank
from probes.card import Format, Stage
from probes.detectors import Detector
from probes.steering.steer import END, Positions, Steer
from probes.taps import Tap


@dataclass(frozen=True, slots=True, eq=False)
class SteerGate:
    """A condition on one number of a row, and the steer that it switches on.

    Attributes:
        steer: its position among the plan's steers.
        kind: which rows are written to once a row lies above the limit.
        check: says which rows are read, and above what they open the gate.
        tap: where the number is read.
        column: of the bank's readouts.
        offset: the same column among those of its tap.
        of_readout: the limit of that number that stands for a limit of the score.
    """

    steer: int
    kind: Gate
    check: Check
    tap: Tap
    column: int
    offset: int
    of_readout: Callable[[float], float | None] = float

    def limit(self, fmt: Format) -> np.float32 | None:
        """Above which a readout opens the gate; None where the format is not calibrated, and nothing does.

        Readouts are float32: the largest one that is not above the threshold divides them exactly as it does.
        """
        stated = self.check.thresholds.get(fmt)
        threshold = None if stated is None else self.of_readout(stated)
        if threshold is None:
            return None
        limit = np.float32(threshold)
        return np.nextafter(limit, np.float32(-np.inf)) if float(limit) > threshold else limit

    @property
    def lowest_limit(self) -> np.float32:
        """The lowest limit of any format; infinite if none is calibrated."""
        limits = [limit for fmt in self.check.thresholds if (limit := self.limit(fmt)) is not None]
        return min(limits, default=np.float32(np.inf))

    def reads(self, num_prompt: int, stream_from: int) -> tuple[int, int]:
        """The first position of a request that can open the gate, and the one behind the last.

        Args:
            num_prompt: prompt tokens of the request.
            stream_from: position from which streams are read.
        """
        if self.check.stage is Stage.PROMPT:
            return self.check.skip_first, num_prompt
        return max(stream_from, self.check.skip_first), END


def gate_of_rule(
    file: PolicyFile, where: Place, rule: Rule, *, number: int, steers: Sequence[Steer], check: Check, bank: Bank
) -> SteerGate | None:
    """How the rows of a rule's steer are found.

    Args:
        file: the policy file.
        where: the rule stands.
        rule: that steers.
        number: position of its steer.
        steers: of the plan.
        check: the rule's condition.
        bank: what is read.
    Returns: None if the rule has to fire first, and the rows behind are written to.
    Raises:
        PolicyError: its rows are computed before anybody can know that they are to be written to.
    """
    steer, gate = steers[number], rule.do.gate
    detector = bank.detector(check.detector)
    why = _why_not_one_row(detector, check, steer)
    in_prompt = steer.positions is not Positions.GENERATED
    if check.stage is Stage.PROMPT and gate is Gate.TOKEN and not in_prompt:
        raise file.error(
            (*where, "do", "gate"),
            f"is 'token' at the stage 'prompt', and {steer.name!r} writes to positions: generated: a row opens the "
            "gate for itself alone, so that nothing would ever be written to. Use gate: latched, the stage 'stream', "
            "or a steer with positions: prompt or all.",
        )
    if check.stage is Stage.STREAM and in_prompt:
        raise file.error(
            (*where, "do", "steer"),
            f"is {steer.name!r}, which writes to positions: {steer.positions.value}; at the stage 'stream' the "
            "reply is read. Use a steer with positions: generated, or the stage 'prompt'.",
        )
    if why is not None and (gate is Gate.TOKEN or in_prompt):
        key, said = (
            ("gate", "is 'token'") if gate is Gate.TOKEN else ("steer", f"writes to positions: {steer.positions.value}")
        )
        raise file.error(
            (*where, "do", key),
            f"{said}, but {why}: what is to be written to is not known before it has been computed. Use gate: latched "
            "and a steer with positions: generated, or a condition that one row decides: a detector with one direction "
            "at or below the steer's layer (or one latent), aggregate: {kind: max}, no segments.",
        )
    if why is not None or rule.mode is not Mode.ENFORCE or gate is None:
        return None
    column = int(bank.columns[detector.name][_tap_of(detector)][0])
    offset = column % (bank.capacity + 1)
    return SteerGate(number, gate, check, _tap_of(detector), column, offset, detector.readout_limit)


def _tap_of(detector: Detector) -> Tap:
    return detector.directions()[0].tap


def _why_not_one_row(detector: Detector, check: Check, steer: Steer) -> str | None:
    """Why no single row decides; None if one does."""
    if detector.readout_limit(0.0) is None:
        return f"the scores of {detector.name!r} are computed behind the pass"
    if not check.aggregate.one_score_decides:
        return f"aggregate {check.aggregate} rests on several rows"
    if check.by_length:
        return "its threshold depends on the request's length (state above: {value: NUMBER} to have one for all)"
    if check.segments is not None:
        return "whose tokens a row belongs to ('segments') is not known in the pass"
    if _tap_of(detector).layer > steer.tap.layer:
        return f"{detector.name!r} is read at {_tap_of(detector)}, above the steer at {steer.tap}"
    return None
