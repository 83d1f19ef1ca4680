"""A scripted engine: steps with the readouts that a test wants. Drives decisions; is no evidence of coverage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from monitor.monitor import Monitor, StepReadouts
from monitor.policy import Plan
from monitor.rollout import Subjects
from monitor.segments import PromptMap, Run
from monitor.types import Role
from probes.card import Format
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, unit_artifact

Rows = npt.NDArray[np.float32]
Part = tuple[str, Sequence[int], Rows]


def chat(num_prompt: int) -> PromptMap:
    """A chat of one user message whose reply begins with the first generated token."""
    return PromptMap((Run(Role.USER, num_prompt),), stream_from=num_prompt)


class Script:
    """Builds steps for a plan.

    Args:
        plan: its linear detectors get the scores that are asked for.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        bank = plan.bank
        self._columns = np.array([next(iter(bank.columns[d.name].values()))[0] for d in bank.detectors])

    def rows(self, scores: npt.ArrayLike) -> Rows:
        """Readout rows with these scores: (n,) for one detector, else (n, detectors)."""
        wanted = np.asarray(scores, dtype=np.float64)
        if wanted.ndim == 1:
            wanted = wanted[:, None]
        rows = np.zeros((len(wanted), self.plan.bank.width), dtype=np.float32)
        rows[:, self._columns] = wanted
        return rows

    def step(self, parts: Iterable[Part]) -> StepReadouts:
        """One step: of each request the positions and rows, in this order."""
        listed = list(parts)
        counts = np.array([len(positions) for _, positions, _ in listed], dtype=np.int64)
        none = np.zeros((0, self.plan.bank.width), dtype=np.float32)
        return StepReadouts(
            request_ids=[name for name, _, _ in listed],
            counts=counts,
            starts=np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if listed else counts,
            positions=np.concatenate([np.array(positions, dtype=np.int64) for _, positions, _ in listed] or [counts]),
            readouts=np.concatenate([rows for _, _, rows in listed] or [none]),
        )


class Case:
    """A monitor with one linear detector and its script."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.monitor = Monitor(plan)
        self.script = Script(plan)

    def admit(
        self,
        name: str = "a",
        *,
        num_prompt: int = 3,
        fmt: Format = Format.CHAT,
        prompt: PromptMap | None = None,
        subjects: Subjects | None = None,
    ) -> None:
        known = prompt or chat(num_prompt)
        self.monitor.admit(name, num_prompt=num_prompt, policy=None, fmt=fmt, prompt=known, subjects=subjects)

    def see(self, scores: list[float], start: int = 0, name: str = "a") -> tuple[str, str]:
        """Feed rows; the action and its rule after them."""
        rows = self.script.rows(scores)
        self.monitor.observe(self.script.step([(name, range(start, start + len(scores)), rows)]))
        return self.state(name)

    def state(self, name: str = "a") -> tuple[str, str]:
        request = self.monitor.get(name)
        assert request is not None
        return request.action.action.value, request.rule


def make_case(
    folder: Path, *rules: str, policy: str = "", skip_first: int = 1, formats: tuple[Format, ...] = ()
) -> Case:
    card = make_card(skip_first=skip_first, formats=formats or tuple(Format), calibrations=[calibration()])
    return Case(plan_of(folder, policy_text("\n".join(rules), policy=policy), {"harm": unit_artifact(card)}))
