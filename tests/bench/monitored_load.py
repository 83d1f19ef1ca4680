"""A monitor under a server's load, as the micro-benchmarks measure it: many live requests and detectors, few rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from monitor.monitor import Monitor
from monitor.policy import Plan
from monitor.report import encode_report, make_report, take_tally
from monitor.segments import PromptMap, Run
from monitor.types import Role
from probes.aggregate import Aggregator
from probes.aggregate.ema import Ema
from probes.aggregate.max import Max
from probes.aggregate.mean import Mean
from probes.aggregate.rolling import Rolling
from probes.card import Format, Stage
from serving.engine.drafts import step_readouts
from serving.engine.readouts import WorkerReadouts
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact

DETECTORS = 64
KINDS: tuple[Aggregator, ...] = (Max(), Ema(alpha=0.1), Mean(), Rolling(window=8))
RULES = 10
LAYERS = (0, 1, 2)
PROMPT = 32


def make_plan(folder: Path, *, ends: int = 0, joined: int = 0) -> Plan:
    """64 linear detectors over three taps and four kinds of aggregates; ten of them have a rule that never fires.

    Args:
        folder: for the policy file.
        ends: how many of them, of those without a rule, are watched at the end of a reply.
        joined: further rules, none of which fires either, that each join a stream verdict, a negated prompt verdict and
            a weighted sum of two.
    """
    names = [f"d{number}" for number in range(DETECTORS)]
    artifacts = {}
    for number, name in enumerate(names):
        kind = KINDS[number % len(KINDS)]
        stage = Stage.RESPONSE if number >= DETECTORS - ends else Stage.STREAM
        calibrations = [calibration(stage, aggregate=kind, threshold=1e9, top_scores=(1e9,))]
        artifacts[name] = unit_artifact(
            make_card(name, layers=(LAYERS[number % len(LAYERS)],), calibrations=calibrations), number % 8
        )
    rules = [
        rule(name, detector=name, stage="stream" if number % 2 else "prompt",
             when=f"aggregate: {flow(KINDS[number % len(KINDS)])}, above: {{value: 1.0e9}}")
        for number, name in enumerate(names[:RULES])
    ]  # fmt: skip
    rules += [_joined(f"joined-{number}", names[number : number + 30 : 10], number) for number in range(joined)]
    return plan_of(folder, policy_text("\n".join(rules), names=names), artifacts)


def _joined(name: str, names: list[str], number: int) -> str:
    first, second, third = (
        f"{{detector: {found}, aggregate: {flow(KINDS[(number + 10 * place) % len(KINDS)])}"
        for place, found in enumerate(names)
    )
    above = "above: {value: 1.0e9}}"
    both = f"{{all: [{first}, stage: stream, {above}, {{not: {second}, stage: prompt, {above}}}]}}"
    weighed = f"{{weigh: [{first}, weight: 1}}, {third}, weight: 1}}], stage: stream, {above}"
    return f"{{name: {name}, when: {{any: [{both}, {weighed}]}}, do: {{action: block}}, mode: enforce}}"


def flow(aggregate: Aggregator) -> str:
    """An aggregate as it stands in a policy file."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in aggregate.config().items()) + "}"


class Scheduled:
    """What a step of the scheduler says: no drafts."""

    def __init__(self) -> None:
        self.scheduled_spec_decode_tokens: dict[str, list[int]] = {}


class Load:
    """A monitor with live requests that decode, one row each in every step."""

    def __init__(self, plan: Plan, requests: int) -> None:
        self.monitor = Monitor(plan)
        self.names = [f"{number}-0123abcd" for number in range(requests)]
        self.width = plan.bank.width
        self.random = np.random.default_rng(1)
        self.position = 0
        self.scheduled: Any = Scheduled()
        for name in self.names:
            self.admit(name, PROMPT)
        self.take(self.names, PROMPT)

    def admit(self, name: str, num_prompt: int) -> None:
        prompt = PromptMap((Run(Role.USER, num_prompt),), stream_from=num_prompt)
        self.monitor.admit(name, num_prompt=num_prompt, policy=None, fmt=Format.CHAT, prompt=prompt)

    def sent(self, names: list[str], start: int, count: int) -> WorkerReadouts:
        """What a worker sends of a step in which each request has ``count`` rows."""
        positions = np.tile(np.arange(start, start + count, dtype=np.int64), len(names))
        rows = self.random.standard_normal((len(positions), self.width)).astype(np.float32)
        return WorkerReadouts(names, np.full(len(names), count, dtype=np.int64), positions, rows)

    def take(self, names: list[str], count: int) -> None:
        self.step(self.sent(names, self.position, count), names)
        self.position += count

    def step(self, sent: WorkerReadouts, told: list[str]) -> int:
        """All that the scheduler does about a step: split the rows, observe, decide, write the report.

        Args:
            sent: by the worker.
            told: requests that the report describes.
        Returns: bytes of the report.
        """
        self.monitor.observe(step_readouts(sent, self.scheduled, None, requests={}, max_model_len=4096))
        requests = [request for name in told if (request := self.monitor.get(name)) is not None]
        report = make_report(self.monitor, requests, (), take_tally(self.monitor, [0.0]))
        return int(encode_report(report).nbytes)
