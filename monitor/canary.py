"""Canaries: prompts whose scores are known, what came back, and whether an engine passes. Has no clock of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from probes.card import Card

Float64 = npt.NDArray[np.float64]
PLAIN_TOKENS = 8


class CanaryFailure(StrEnum):
    """Why a canary did not pass."""

    WRONG_SCORES = "wrong_scores"
    """A token's score differs from the card's by more than the tolerance."""
    NOT_FINITE = "not_finite"
    """A readout or score is NaN or infinite: a tap did not run, or the stream is broken."""
    NOT_SEEN = "not_seen"
    """A token came back without readouts."""
    LATE = "late"
    """It was begun and not answered within the deadline."""
    MISSING = "missing"
    """None was sent for longer than the period and the deadline together."""
    NO_ANSWER = "no_answer"
    """The engine does not say within the deadline how its canaries did."""
    ERROR = "error"
    """Scoring it failed."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A canary that did not pass.

    Attributes:
        reason: one word for it, for metrics.
        detail: for the log; holds scores, so it is not for clients.
    """

    reason: CanaryFailure
    detail: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What the card of one detector says of a canary prompt.

    Attributes:
        detector: its name in the policy file.
        column: of its first channel in the bank's scores.
        skip_first: leading positions without a score.
        scores: (tokens - skip_first, channels).
        tolerance: greatest difference that passes.
    """

    detector: str
    column: int
    skip_first: int
    scores: Float64
    tolerance: float


@dataclass(frozen=True, slots=True)
class CanaryPrompt:
    """One prompt, and all detectors that know its scores; without any, only that every token is read can be checked."""

    tokens: tuple[int, ...]
    expected: tuple[Expected, ...] = ()

    def compare(self, scores: Float64, seen: npt.NDArray[np.bool_]) -> Failed | None:
        """Judge what came back.

        Args:
            scores: (tokens, width of the bank's scores), NaN where a readout was not finite.
            seen: (tokens,), whether readouts came for it.
        Returns: the first thing that is wrong; None if it passes.
        """
        if not seen.all():
            missing = np.flatnonzero(~seen)
            return Failed(
                CanaryFailure.NOT_SEEN, f"canary: {len(missing)} tokens without readouts, the first at {missing[0]}"
            )
        broken = np.argwhere(~np.isfinite(scores))
        if len(broken):
            position, column = (int(number) for number in broken[0])
            return Failed(CanaryFailure.NOT_FINITE, f"canary: {self._name(column)} at position {position}: not finite")
        worst: tuple[float, Expected, int, int] | None = None
        for expected in self.expected:
            found = scores[expected.skip_first :, expected.column : expected.column + expected.scores.shape[1]]
            excess = np.abs(found - expected.scores) / expected.tolerance
            place, channel = (int(number) for number in np.unravel_index(np.argmax(excess), excess.shape))
            if excess[place, channel] > 1 and (worst is None or excess[place, channel] > worst[0]):
                worst = (float(excess[place, channel]), expected, place, channel)
        if worst is None:
            return None
        _, expected, place, channel = worst
        position = place + expected.skip_first
        return Failed(
            CanaryFailure.WRONG_SCORES,
            f"canary: detector {expected.detector!r} at position {position}: expected "
            f"{expected.scores[place, channel]:.5g} (within {expected.tolerance:.2g}), found "
            f"{scores[position, expected.column + channel]:.5g}",
        )

    def deviation(self, scores: Float64) -> float:
        """The largest difference from the cards as a share of what each allows; NaN where a score is none.

        Args:
            scores: (tokens, width of the bank's scores).
        """
        found = [
            np.max(np.abs(scores[e.skip_first :, e.column : e.column + e.scores.shape[1]] - e.scores)) / e.tolerance
            for e in self.expected
        ]
        return float(max(found, default=0.0))

    def _name(self, column: int) -> str:
        names = [e.detector for e in self.expected if 0 <= column - e.column < e.scores.shape[1]]
        return f"detector {names[0]!r}" if names else f"score number {column}"


def canary_prompts(cards: Mapping[str, Card], columns: Mapping[str, int], *, vocab: int) -> tuple[CanaryPrompt, ...]:
    """The prompts of all cards, each once; a plain one if no card has a canary.

    Args:
        cards: by the detector's name.
        columns: of the bank's scores, by the same name.
        vocab: tokens of the model.
    """
    by_tokens: dict[tuple[int, ...], list[Expected]] = {}
    for name, card in cards.items():
        if card.canary is not None:
            scores = np.array(card.canary.scores).reshape(len(card.canary.tokens) - card.skip_first, -1)
            expected = Expected(name, columns[name], card.skip_first, scores, card.canary.tolerance)
            by_tokens.setdefault(card.canary.tokens, []).append(expected)
    if not by_tokens:
        by_tokens[tuple((7 + 31 * number) % vocab for number in range(PLAIN_TOKENS))] = []
    return tuple(CanaryPrompt(tokens, tuple(expected)) for tokens, expected in by_tokens.items())


class CanaryWatch:
    """Whether the canaries of one engine pass. All times are seconds since any one moment.

    Args:
        prompts: those that are sent, in every round.
        every: seconds between two rounds.
        deadline: seconds from a canary's first step to its last.
    """

    def __init__(self, prompts: Sequence[CanaryPrompt], *, every: float, deadline: float) -> None:
        self._by_tokens = {prompt.tokens: prompt for prompt in prompts}
        self._every = every
        self._deadline = deadline
        self._verdicts: dict[tuple[int, ...], Failed | None] = {}
        self._begun: dict[str, float | None] = {}
        self._heard: float | None = None

    def prompt(self, tokens: Sequence[int]) -> CanaryPrompt | None:
        """The prompt with these tokens."""
        return self._by_tokens.get(tuple(tokens))

    def arrived(self, request_id: str, now: float) -> None:
        """A canary stands in the queue. Waiting there is load, not a fault: its time runs from its first step."""
        self._begun[request_id] = None
        self._heard = now

    def began(self, request_id: str, now: float) -> None:
        """A canary is in a step."""
        if self._begun.get(request_id, now) is None:
            self._begun[request_id] = now

    def done(self, request_id: str, tokens: Sequence[int], verdict: Failed | None, now: float) -> Failed | None:
        """A canary has ended.

        Args:
            request_id: that has arrived.
            tokens: of its prompt.
            verdict: of the comparison.
            now: when.
        Returns: the verdict, or that it was late.
        """
        begun = self._begun.pop(request_id, None)
        self._heard = now
        if verdict is None and begun is not None:
            verdict = self._late(now - begun)
        self._verdicts[tuple(tokens)] = verdict
        return verdict

    def withdrawn(self, request_id: str, now: float) -> None:
        """A canary was aborted before its prompt was through: too late, or given up while it waited."""
        begun = self._begun.pop(request_id, None)
        self._heard = now
        if begun is not None and (late := self._late(now - begun)) is not None:
            for tokens in self._by_tokens:
                self._verdicts[tokens] = late

    @property
    def waiting(self) -> bool:
        """Whether a canary stands in the queue and has not been in a step."""
        return any(begun is None for begun in self._begun.values())

    @property
    def passed(self) -> bool:
        """Whether the newest canary of every prompt has passed."""
        return bool(self._verdicts) and all(
            tokens in self._verdicts and self._verdicts[tokens] is None for tokens in self._by_tokens
        )

    def failing(self, now: float) -> Failed | None:
        """Why readouts are not to be trusted at present; None if they are.

        Until the first canary arrives nobody watches (vLLM's offline class has no one who would send any).
        """
        for verdict in self._verdicts.values():
            if verdict is not None:
                return verdict
        for begun in self._begun.values():
            if begun is not None and (late := self._late(now - begun)) is not None:
                return late
        if self._heard is None or self._begun:
            return None
        silent = now - self._heard
        if silent <= self._every + self._deadline:
            return None
        return Failed(
            CanaryFailure.MISSING, f"canary: none came for {silent:.0f} s; one is due every {self._every:g} s"
        )

    def _late(self, took: float) -> Failed | None:
        if took <= self._deadline:
            return None
        return Failed(CanaryFailure.LATE, f"canary: {took:.2f} s, the deadline is {self._deadline:g} s")
