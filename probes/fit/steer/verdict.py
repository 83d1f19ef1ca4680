"""Whether a steer is worth having, by a stated rule on figures; it knows no model and no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from probes.fit.evaluation.measure import Estimate
from probes.fit.steer.behaviour import MIN_AUROC

__all__ = ["LIMITS", "Grade", "Limits", "Reference", "SteerVerdict", "Strength", "decide"]


class Grade(StrEnum):
    """What is to be done with a steer."""

    SHIP = "ship"
    """It works, better than random directions and no worse than a prompt, within the limits."""
    ASSIST = "assist"
    """The effect is real, but a prompt does more, or a side effect goes beyond its limit."""
    REJECT = "reject"
    """No real effect, or the text falls apart wherever there is one, or the judge cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large side effects may be.

    Attributes:
        kl: nats per token on ordinary text.
        distinct_2: share of the plain model's.
        anti_steered: share of prompts.
        over_refusal: rise of the share of harmless prompts that are refused.
    """

    kl: float = 0.1
    distinct_2: float = 0.8
    anti_steered: float = 0.1
    over_refusal: float = 0.05


LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Strength:
    """What a steer did at one strength.

    Attributes:
        strength: of the operator.
        target: mean P(target) of the replies.
        gain: over the plain model's replies to the same prompts, with its interval.
        random_top: the upper end of the random directions' band of mean P(target).
        kl, distinct_2, anti_steered, over_refusal: as in ``Limits``, but none of them relative to the plain model.
    """

    strength: float
    target: float
    gain: Estimate
    random_top: float
    kl: float
    distinct_2: float
    anti_steered: float
    over_refusal: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What steers are held against.

    Attributes:
        judge_auroc: of the judge on texts that it has not seen.
        distinct_2, over_refusal: of the plain model.
        prompt_gain: of the instruction in a system message.
    """

    judge_auroc: float
    distinct_2: float
    over_refusal: float
    prompt_gain: float


@dataclass(frozen=True, slots=True)
class SteerVerdict:
    """The grade and why.

    Attributes:
        grade: of the steer as a whole, by its best strength.
        recommended: the strength with the largest real gain within the limits; None if there is none.
        reasons: in words, the deciding ones first.
    """

    grade: Grade
    recommended: float | None
    reasons: tuple[str, ...]


def decide(strengths: Sequence[Strength], reference: Reference, limits: Limits = LIMITS) -> SteerVerdict:
    """The grade of a steer.

    An effect is *real* at a strength if the interval of its gain lies above 0 and the mean score above the band of the
    random directions. A strength is *within the limits* if all side effects are.

    Args:
        strengths: at least one.
        reference: what they are held against.
        limits: of the side effects.
    """
    if reference.judge_auroc < MIN_AUROC:
        return SteerVerdict(
            Grade.REJECT,
            None,
            (
                f"The judge cannot tell the behaviour: AUROC {reference.judge_auroc:.3f} on texts that it has not "
                f"seen, {MIN_AUROC} is needed. Give more or clearer examples.",
            ),
        )
    real = [item for item in strengths if item.gain.low > 0 and item.target > item.random_top]
    if not real:
        return SteerVerdict(Grade.REJECT, None, tuple(_why_not_real(item) for item in strengths))
    within = [item for item in real if not _breaches(item, reference, limits)]
    if not within:
        whole = [item for item in real if item.distinct_2 >= limits.distinct_2 * reference.distinct_2]
        reasons = tuple(_sentence(item, _breaches(item, reference, limits)) for item in real)
        if not whole:
            return SteerVerdict(
                Grade.REJECT, None, ("Wherever there is a real effect, the text degenerates.", *reasons)
            )
        most = max(whole, key=lambda item: item.gain.value)
        prompting = (
            f"The instruction alone gains {reference.prompt_gain:.3f}; the steer gains {most.gain.value:.3f} at "
            f"strength {most.strength:g}, the most before the text degenerates."
        )
        return SteerVerdict(
            Grade.ASSIST, None, ("The effect is real, but no strength has it within the limits.", prompting, *reasons)
        )
    best = max(within, key=lambda item: item.gain.value)
    found = (
        f"At strength {best.strength:g} the gain is {_interval(best.gain)}, above the random directions' "
        f"({best.target:.3f} against at most {best.random_top:.3f}), with all side effects within their limits."
    )
    if best.gain.value < reference.prompt_gain:
        return SteerVerdict(
            Grade.ASSIST,
            best.strength,
            (f"Prompting does more: a gain of {reference.prompt_gain:.3f} by the instruction alone.", found),
        )
    return SteerVerdict(
        Grade.SHIP,
        best.strength,
        (found, f"Prompting does no more: a gain of {reference.prompt_gain:.3f} by the instruction alone."),
    )


def _breaches(item: Strength, reference: Reference, limits: Limits) -> list[str]:
    checks = (
        (item.kl > limits.kl, f"KL {item.kl:.3f} nats a token (limit {limits.kl})"),
        (
            item.distinct_2 < limits.distinct_2 * reference.distinct_2,
            f"distinct-2 {item.distinct_2:.2f} against {reference.distinct_2:.2f} (limit {limits.distinct_2:.0%} of "
            "that)",
        ),
        (
            item.anti_steered > limits.anti_steered,
            f"{item.anti_steered:.0%} of the prompts anti-steered (limit {limits.anti_steered:.0%})",
        ),
        (
            item.over_refusal > reference.over_refusal + limits.over_refusal,
            f"refuses {item.over_refusal:.0%} of harmless prompts against {reference.over_refusal:.0%} "
            f"(limit {limits.over_refusal * 100:g} points more)",
        ),
    )
    return [said for breached, said in checks if breached]


def _why_not_real(item: Strength) -> str:
    why = []
    if item.gain.low <= 0:
        why.append(f"the gain is {_interval(item.gain)}: its interval is not above 0")
    if item.target <= item.random_top:
        why.append(f"random directions reach {item.random_top:.3f}, it {item.target:.3f}")
    return _sentence(item, why)


def _sentence(item: Strength, parts: Sequence[str]) -> str:
    return f"Strength {item.strength:g}: {'; '.join(parts)}."


def _interval(gain: Estimate) -> str:
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
