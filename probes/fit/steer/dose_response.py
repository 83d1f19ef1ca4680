"""The dose-response experiment on one direction: conditions, and the figures of each. No verdict, no report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from scipy.stats import bootstrap

from probes.fit.evaluation.measure import Estimate
from probes.fit.steer.behaviour import Judge
from probes.fit.steer.side_effects import NeutralText, distinct_2, harmless_prompts, longest_repeat, refusal_rate
from probes.fit.steer.steered_model import Reply, SteeredModel
from probes.fit.steer.trial import EvalError, Trial
from probes.fit.steer.writes import Writes
from probes.steering.artifact import SteerArtifact
from probes.steering.base import Float64, Sign
from probes.steering.steer import Steer, make_steer

__all__ = [
    "ANTI_STEERED_BY",
    "Condition",
    "DoseResponse",
    "Figures",
    "Spread",
    "random_steer",
    "run_conditions",
    "run_trial",
]

S = TypeVar("S", bound=Writes)
ANTI_STEERED_BY = 0.05
"""A prompt is anti-steered if its score falls by more than this below its plain score."""
_RESAMPLES = 2000
_SAMPLES = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured under one condition, or in the mean over random directions.

    Attributes:
        target: mean P(target) of the replies, with its bootstrap 95 % interval over prompts.
        gain: the same of the differences to the plain model's replies, prompt by prompt.
        anti_steered: share of prompts whose score fell by more than ``ANTI_STEERED_BY``.
        over_refusal: share of the harmless prompts that are refused.
        kl, ce_change: on ordinary text, nats per token; None where nothing is written to it.
        distinct_2: mean over the replies.
        longest_repeat: mean over the replies, tokens.
        dose: mean over the rows of replies that were written to, in median norms.
        tokens: mean length of a reply.
    """

    target: Estimate
    gain: Estimate
    anti_steered: float
    over_refusal: float
    kl: float | None
    ce_change: float | None
    distinct_2: float
    longest_repeat: float
    dose: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Random directions at one strength: the mean target score of each."""

    targets: tuple[float, ...]

    @property
    def low(self) -> float:
        """The lowest of them, or two standard deviations below their mean, whichever is lower."""
        return min(*self.targets, float(np.mean(self.targets)) - 2 * self._deviation)

    @property
    def top(self) -> float:
        """The highest of them, or two standard deviations above their mean, whichever is higher."""
        return max(*self.targets, float(np.mean(self.targets)) + 2 * self._deviation)

    @property
    def _deviation(self) -> float:
        return float(np.std(self.targets, ddof=1)) if len(self.targets) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Condition:
    """One way of asking, and what came of it.

    Attributes:
        name: ``plain``, ``instruction``, ``steer`` or ``random``.
        strength: of the operator, if there is one.
        figures: for ``random`` the means over all directions.
        samples: a few replies, to the first prompts.
        spread: of the directions, for ``random``.
    """

    name: str
    strength: float | None
    figures: Figures
    samples: tuple[str, ...] = ()
    spread: Spread | None = None


@dataclass(frozen=True, slots=True)
class DoseResponse:
    """All conditions of a trial; steer and random stand in the order of the strengths."""

    plain: Condition
    instruction: Condition
    steered: tuple[Condition, ...]
    random: tuple[Condition, ...]


def random_steer(steer: Steer, generator: np.random.Generator) -> Steer:
    """A steer that gives each row the dose that ``steer`` gives it, along a random direction of the same length.

    What is read stays as it is, so that ``ablate`` and ``cap`` are held against equal doses too.
    """
    drawn = generator.standard_normal(steer.update.write.shape)
    drawn *= np.linalg.norm(steer.update.write) / np.linalg.norm(drawn)
    return replace(steer, update=replace(steer.update, write=drawn))


def run_trial(
    trial: Trial,
    artifact: SteerArtifact,
    *,
    model: SteeredModel,
    judge: Judge,
    progress: Callable[[str], None],
) -> DoseResponse:
    """Every condition.

    Args:
        trial: what is tried.
        artifact: the direction.
        model: the artifact's.
        judge: of the behaviour that more of the direction makes. Where the operator makes less of it, the target is
            its absence: 1 - P(behaviour).
        progress: told what is being done.
    Raises:
        EvalError: the trial has no operators.
        SteerError: a strength exceeds ``trial.max_dose``, or the direction cannot be used.
    """
    if not trial.operators:
        raise EvalError("there is no strength to try. Give at least one operator.")
    steers = [
        # Evaluated, not served: what a steer does to safety is for the policy file to allow.
        make_steer(
            artifact.card.name,
            artifact,
            operator,
            positions=trial.positions,
            max_dose=trial.max_dose,
            allow_safety_reducing=True,
        )
        for operator in trial.operators
    ]
    sign = trial.operators[0].sign
    return run_conditions(trial, steers, random_steer, sign=sign, model=model, judge=judge, progress=progress)


def run_conditions(
    trial: Trial,
    steers: Sequence[S],
    at_random: Callable[[S, np.random.Generator], S],
    *,
    sign: Sign,
    model: SteeredModel,
    judge: Judge,
    progress: Callable[[str], None],
) -> DoseResponse:
    """Every condition of what is written at several strengths.

    Args:
        trial: prompts and counts.
        steers: weakest first, all after one layer.
        at_random: the control of one: the same doses along a random direction.
        sign: whether they make more or less of the behaviour.
        model: that is steered.
        judge: of the behaviour.
        progress: told what is being done.
    """
    run = _Run(trial, steers[0].tap.layer, model, judge, sign)
    progress("plain replies")
    plain_scores, plain = run.plain()
    progress("replies to the instruction")
    instruction = run.condition("instruction", plain_scores, system=trial.instruction)
    steered, random = [], []
    for steer in steers:
        progress(f"{steer.name} {steer.strength:g}")
        steered.append(run.condition("steer", plain_scores, steer=steer))
        drawn = []
        for number in range(trial.seeds):
            progress(f"{steer.name} {steer.strength:g}, random direction {number + 1} of {trial.seeds}")
            # The same directions at every strength, so that their curve is one.
            drawn.append(
                run.condition(
                    "random", plain_scores, steer=at_random(steer, np.random.default_rng((trial.seed, number)))
                )
            )
        random.append(_mean_of(drawn))
    return DoseResponse(plain, instruction, tuple(steered), tuple(random))


class _Run:
    def __init__(self, trial: Trial, layer: int, model: SteeredModel, judge: Judge, sign: Sign) -> None:
        self._trial, self._model, self._judge, self._sign = trial, model, judge, sign
        self._neutral = NeutralText(model, layer=layer, lines=trial.neutral_lines)

    def plain(self) -> tuple[Float64, Condition]:
        replies = self._replies(None, None)
        scores = self._scores(replies)
        return scores, self._condition("plain", replies, scores, None)

    def condition(
        self, name: str, plain_scores: Float64, *, steer: Writes | None = None, system: str | None = None
    ) -> Condition:
        return self._condition(name, self._replies(steer, system), plain_scores, steer)

    def _replies(self, steer: Writes | None, system: str | None) -> list[Reply]:
        prompts = [*self._trial.prompts, *harmless_prompts()]
        tokens = [self._model.chat(prompt, system=system) for prompt in prompts]
        return self._model.generate(tokens, steer=steer, max_new_tokens=self._trial.max_tokens)

    def _scores(self, replies: Sequence[Reply]) -> Float64:
        chances = self._judge([reply.text for reply in replies[: len(self._trial.prompts)]])
        return chances if self._sign is Sign.MORE else 1 - chances

    def _condition(self, name: str, replies: Sequence[Reply], plain_scores: Float64, steer: Writes | None) -> Condition:
        target, harmless = replies[: len(self._trial.prompts)], replies[len(self._trial.prompts) :]
        scores = self._scores(replies)
        change = scores - plain_scores
        doses = np.concatenate([reply.doses for reply in target])
        cost = None if name == "instruction" else self._neutral.cost(steer)
        figures = Figures(
            target=_interval(scores, self._trial.seed),
            gain=_interval(change, self._trial.seed),
            anti_steered=float(np.mean(change < -ANTI_STEERED_BY)),
            over_refusal=refusal_rate([reply.text for reply in harmless]),
            kl=cost.kl if cost else None,
            ce_change=cost.ce_change if cost else None,
            distinct_2=float(np.mean([distinct_2(reply.tokens) for reply in target])),
            longest_repeat=float(np.mean([longest_repeat(reply.tokens) for reply in target])),
            dose=float(doses.mean() / steer.unit) if steer is not None and doses.size else 0.0,
            tokens=float(np.mean([len(reply.tokens) for reply in target])),
        )
        samples = tuple(reply.text for reply in target[:_SAMPLES])
        return Condition(name, None if steer is None else steer.strength, figures, samples)


def _interval(values: Float64, seed: int) -> Estimate:
    if np.ptp(values) == 0:
        return Estimate(*[float(values[0])] * 3)
    found = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(float(values.mean()), float(found.low), float(found.high))


def _mean_of(drawn: Sequence[Condition]) -> Condition:
    figures = [condition.figures for condition in drawn]

    def estimate(name: str) -> Estimate:
        found: Sequence[Estimate] = [getattr(item, name) for item in figures]
        return Estimate(*(float(np.mean([getattr(item, end) for item in found])) for end in ("value", "low", "high")))

    estimates: dict[str, Any] = {name: estimate(name) for name in ("target", "gain")}
    means: dict[str, Any] = {
        field.name: float(np.mean([getattr(item, field.name) for item in figures]))
        for field in fields(Figures)
        if field.name not in estimates
    }
    return Condition(
        "random",
        drawn[0].strength,
        Figures(**estimates, **means),
        drawn[0].samples,
        Spread(tuple(item.target.value for item in figures)),
    )
