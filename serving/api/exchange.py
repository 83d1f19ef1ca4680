"""One request whose reply is withheld: asks for it, looks at what was decided, and does that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

import structlog
from starlette.types import Send

from monitor.attempt import Attempt, Holds
from monitor.compiled import CompiledRule
from monitor.handling import Handling
from monitor.outcome import Outcome
from monitor.types import Action, ActionCode
from serving.api.client import Client, ClientGoneError
from serving.api.desk import Desk
from serving.api.opinions import Opinion
from serving.api.rewriting import RewriteError, with_model, with_system
from serving.api.upstream import UpstreamError
from serving.api.withheld import WithheldResponse
from serving.hold import Hold, Reply

log = structlog.get_logger(__name__)


_ON_FAILURE = {
    Action.BLOCK: Outcome.FAILED_REFUSED,
    Action.FLAG: Outcome.FAILED_FLAGGED,
    Action.ALLOW: Outcome.FAILED_RELEASED,
}
_REFUSALS = frozenset({Outcome.FLAGGED, Outcome.FAILED_REFUSED})
_WORST_FIRST = (
    Outcome.FLAGGED,
    Outcome.FAILED_REFUSED,
    Outcome.FAILED_FLAGGED,
    Outcome.FAILED_RELEASED,
    Outcome.CLEAN,
)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one attempt gave."""

    hold: Hold
    response: WithheldResponse

    @property
    def replies(self) -> list[Reply]:
        """Of all its choices."""
        return list(self.hold.replies.values())

    def with_action(self, *codes: ActionCode) -> list[Reply]:
        """Those about which one of these was decided."""
        return [reply for reply in self.replies if reply.decided in codes]

    @property
    def decisive(self) -> Reply | None:
        """The one about which the most severe was decided; None if nothing was that has to be done here."""
        worst = max(self.replies, key=lambda reply: reply.decided, default=None)
        return worst if worst is not None and worst.decided >= ActionCode.ESCALATE else None


class Exchange:
    """One request, with its one or two attempts at an answer.

    Args:
        desk: whom to turn to.
        attempt: asks the application for an answer that it withholds.
        client: who waits.
        send: ASGI's own.
        path: of the route.
        body: of the request.
    """

    def __init__(
        self,
        desk: Desk,
        attempt: Callable[[bytes, Hold], Awaitable[WithheldResponse]],
        client: Client,
        *,
        send: Send,
        path: str,
        body: bytes,
    ) -> None:
        self._desk = desk
        self._attempt = attempt
        self._client = client
        self._send = send
        self._path = path
        self._body = body

    async def run(self) -> None:
        """Answer the request."""
        first = await self._ask(self._body, Hold())
        if first.response.passed:
            return
        reply = first.decisive
        rule = reply.record.rule if reply is not None else None
        if self._client.gone:
            if reply is not None and rule is not None:
                self._desk.tell(rule, reply, Outcome.LEFT)
            return
        handling = rule.handling if rule is not None else None
        again = reply is not None and reply.decided in {ActionCode.ROUTE, ActionCode.REGENERATE}
        if not again or reply is None or rule is None or handling is None:
            await self._judged(first)
            return
        if not self._desk.opinions.may(reply.record.policy_name, rule):
            log.warning("not done: the budget of this minute is spent", rule=rule.name)
            await self._fail(first, rule, reply)
        elif rule.action is Action.ROUTE and handling.to.upstream is not None:
            await self._routed(first, rule, reply, handling)
        else:
            await self._again(first, rule, reply, handling)

    async def _ask(self, body: bytes, hold: Hold) -> _Answer:
        return _Answer(hold, await self._attempt(body, hold))

    async def _judged(self, answer: _Answer, caused: tuple[CompiledRule, Reply] | None = None) -> None:
        """Release an answer as far as its rules let it.

        Args:
            answer: that is not asked for again.
            caused: rule and reply that made it the second one.
        """
        worst = answer.decisive
        if worst is None:
            await self._release(answer, caused, Outcome.SECOND)
            return
        rule = worst.record.rule
        if worst.decided is ActionCode.ESCALATE and rule is not None:
            await self._escalated(answer, rule, worst, caused)
            return
        # A block. Where some choice waits for something else, or text stands before the refusal, all is refused anew.
        holds = rule is not None and rule.holds is not Holds.NOTHING
        undone = answer.with_action(ActionCode.ESCALATE, ActionCode.ROUTE, ActionCode.REGENERATE)
        because = caused or ((rule, worst) if rule is not None and holds else None)
        if undone or (holds and answer.response.is_stream):
            told = self._desk.tell(*because, Outcome.REFUSED) if because is not None else None
            await self._refuse(answer, worst, told)
        else:
            await self._release(answer, because, Outcome.REFUSED)

    async def _escalated(
        self, answer: _Answer, rule: CompiledRule, worst: Reply, caused: tuple[CompiledRule, Reply] | None
    ) -> None:
        """Release an answer if somebody else lets it."""
        try:
            outcomes = await self._client.unless_gone(self._outcomes(answer.with_action(ActionCode.ESCALATE)))
        except ClientGoneError:
            self._desk.tell(rule, worst, Outcome.LEFT)
            return
        outcome = next(known for known in _WORST_FIRST if known in outcomes)
        released = outcome not in _REFUSALS
        told = self._desk.tell(rule, worst, outcome)
        if caused is not None:
            told = self._desk.tell(*caused, Outcome.SECOND if released else Outcome.REFUSED)
        if released:
            await answer.response.release(told)
        else:
            await self._refuse(answer, worst, told)

    async def _release(self, answer: _Answer, cause: tuple[CompiledRule, Reply] | None, outcome: Outcome) -> None:
        if not self._client.gone:
            await answer.response.release(self._desk.tell(*cause, outcome) if cause is not None else None)
        elif cause is not None:
            self._desk.tell(*cause, Outcome.LEFT)

    async def _fail(self, answer: _Answer, rule: CompiledRule, reply: Reply) -> None:
        """What was to be done could not be done."""
        await self._refuse(answer, reply, self._desk.tell(rule, reply, Outcome.FAILED_REFUSED))

    async def _refuse(self, answer: _Answer, reply: Reply, told: str | None) -> None:
        """Have the route say the refusal in its own words, as if the prompt had been blocked.

        Args:
            answer: in the place of which it is said.
            reply: about which it was decided, with the rule and its text.
            told: how it came about.
        """
        decided = reply.record.decided
        rule_and_text = (decided.rule, decided.text) if decided is not None else ("", "")
        refusal = await self._ask(self._body, answer.hold.then(Attempt.SECOND, refusal=rule_and_text))
        if not self._client.gone:
            await refusal.response.release(told)

    async def _again(self, first: _Answer, rule: CompiledRule, reply: Reply, handling: Handling) -> None:
        """Ask once more, under other conditions, and release what is better."""
        try:
            body = self._changed(handling)
        except RewriteError as error:
            log.warning("no second attempt", rule=rule.name, why=str(error))
            await self._fail(first, rule, reply)
            return
        steers = {handling.do.steer: 1.0} if handling.do.steer is not None else {}
        second = await self._ask(body, first.hold.then(Attempt.SECOND, steers=steers))
        if self._client.gone:
            self._desk.tell(rule, reply, Outcome.LEFT)
            return
        if second.response.status != HTTPStatus.OK or not second.replies:
            log.warning("no second attempt: the server gave no answer", rule=rule.name, status=second.response.status)
            await self._fail(first, rule, reply)
            return
        worst = second.decisive
        if worst is None or worst.decided is not ActionCode.REGENERATE:
            await self._judged(second, (rule, reply))
        elif worst.record.rule is not None and worst.record.rule.name == rule.name:
            # The rule has fired on both, and its policy releases the better one.
            better = _statistic(second, rule) <= _statistic(first, rule)
            told = self._desk.tell(rule, reply, Outcome.SECOND if better else Outcome.FIRST)
            await (second if better else first).response.release(told)
        else:
            await self._refuse(second, worst, self._desk.tell(rule, reply, Outcome.REFUSED))

    def _changed(self, handling: Handling) -> bytes:
        if handling.do.to is not None:
            return with_model(self._body, handling.to.model or "")
        return with_system(self._path, self._body, handling.do.system) if handling.do.system else self._body

    async def _routed(self, first: _Answer, rule: CompiledRule, reply: Reply, handling: Handling) -> None:
        told = f"action={rule.action.value}; rule={rule.name}; outcome={Outcome.ROUTED.value}"
        passing = self._desk.upstream.pass_on(self._path, self._body, handling, self._send, told)
        try:
            await self._client.unless_gone(passing)
        except ClientGoneError:
            self._desk.tell(rule, reply, Outcome.LEFT)
        except UpstreamError as error:
            log.warning("the other server gives no reply", rule=rule.name, why=str(error))
            await self._fail(first, rule, reply)
        else:
            self._desk.tell(rule, reply, Outcome.ROUTED)

    async def _outcomes(self, replies: list[Reply]) -> list[Outcome]:
        """What comes of the second opinions on all these replies, each by its own rule."""
        asked = [
            self._outcome(reply, rule, rule.handling)
            for reply in replies
            if (rule := reply.record.rule) is not None and rule.handling is not None
        ]
        return list(await asyncio.gather(*asked))

    async def _outcome(self, reply: Reply, rule: CompiledRule, handling: Handling) -> Outcome:
        match await self._desk.opinions.ask(reply.record.policy_name, rule, handling, reply):
            case Opinion.CLEAN:
                return Outcome.CLEAN
            case Opinion.FLAGGED:
                return Outcome.FLAGGED
            case Opinion.FAILED:
                return _ON_FAILURE[handling.on_failure]


def _statistic(answer: _Answer, rule: CompiledRule) -> float:
    """The worst of its choices by the rule's one verdict; what has none is worse than anything."""
    found = [reply.record.statistic(rule.verdicts[0])[1] for reply in answer.replies]
    return max((value if not math.isnan(value) else math.inf for value in found), default=math.inf)
