"""Second opinions on a withheld reply: from detectors, from the served model, or from an external classifier."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import Protocol

import structlog

from monitor.attempt import Holds
from monitor.budget import Budget
from monitor.compiled import CompiledRule
from monitor.handling import Handling
from probes.errors import TelltaleError
from serving.api.classifier import Classifier
from serving.hold import Reply

log = structlog.get_logger(__name__)


class Opinion(StrEnum):
    """What somebody else makes of a text."""

    CLEAN = "clean"
    FLAGGED = "flagged"
    FAILED = "failed"
    """Nobody says."""


class OpinionError(TelltaleError, RuntimeError):
    """There is no second opinion; the text says why."""


class Judge(Protocol):
    """Asks a model what it makes of a text."""

    async def flags(self, question: str, text: str) -> bool:
        """Whether the answer is yes.

        Raises:
            probes.errors.TelltaleError: there is none.
        """


class Opinions:
    """Gives second opinions, each in its time and within its rule's budget.

    Args:
        judge: the served model.
        classifier: calls external ones.
        decode: makes text of tokens.
        clock: seconds, for budgets.
    """

    def __init__(
        self,
        judge: Judge,
        classifier: Classifier,
        decode: Callable[[Sequence[int]], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._judge = judge
        self._classifier = classifier
        self._decode = decode
        self._clock = clock
        self._budgets: dict[tuple[str, str, int | None], Budget] = {}

    def may(self, policy: str, rule: CompiledRule) -> bool:
        """Whether a rule's budget allows what it does once more; if so, it counts."""
        handling = rule.handling
        if handling is None:
            return True
        key = (policy, rule.name, handling.budget)
        if key not in self._budgets:
            self._budgets[key] = Budget(handling.budget, self._clock)
        return self._budgets[key].take()

    async def ask(self, policy: str, rule: CompiledRule, handling: Handling, reply: Reply) -> Opinion:
        """What somebody else makes of a reply, or of its prompt where the rule rests on the prompt alone.

        Args:
            policy: of the rule.
            rule: that escalates.
            handling: of the rule.
            reply: on which it has fired.
        """
        if handling.probe is not None:
            truth = reply.record.truth(handling.probe)
            return Opinion.FAILED if truth is None else (Opinion.FLAGGED if truth else Opinion.CLEAN)
        if not self.may(policy, rule):
            log.warning("no second opinion: the budget of this minute is spent", rule=rule.name)
            return Opinion.FAILED
        text = self._decode(reply.prompt if rule.holds is Holds.PROMPT else reply.tokens)
        try:
            async with asyncio.timeout(handling.timeout):
                flagged = await self._asked(rule, handling, reply, text)
        except TimeoutError:
            log.warning("no second opinion in time", rule=rule.name, seconds=handling.timeout)
            return Opinion.FAILED
        except TelltaleError as error:
            log.warning("no second opinion", rule=rule.name, why=str(error))
            return Opinion.FAILED
        return Opinion.FLAGGED if flagged else Opinion.CLEAN

    def _asked(self, rule: CompiledRule, handling: Handling, reply: Reply, text: str) -> Awaitable[bool]:
        to = handling.to
        if to.judge is not None:
            return self._judge.flags(to.judge, text)
        number = rule.verdicts[0]
        detector, statistic = reply.record.statistic(number)
        score = statistic if math.isfinite(statistic) else None
        return self._classifier.flags(to.classifier or "", to.key_env, text, detector=detector, score=score)
