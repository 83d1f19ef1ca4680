"""Makes events of what the API process learns, and hands them to the audit trail and to sinks. Decides nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from monitor.audit.redaction import KeptTexts, RedactionError
from monitor.audit.writer import Ticket
from monitor.canary import Failed
from monitor.check import Check
from monitor.compiled import CompiledPolicy
from monitor.events import (
    ActedRule,
    CanaryFailed,
    Content,
    ConversationFired,
    CoverageRecord,
    Decision,
    Explanation,
    GapSeen,
    Handled,
    PolicyReloaded,
    ProbingSuspected,
    SteerRecord,
    Verdict,
)
from monitor.outcome import HandledRule, Outcome
from monitor.outlet import Outlet
from monitor.policy import Plan
from monitor.types import (
    ON_GAP,
    ON_SESSION_FAILURE,
    ON_UNCALIBRATED,
    Action,
    ActionCode,
    Gap,
    Mode,
    PromptEvent,
    ReloadOutcome,
    Skip,
)
from monitor.verdicts import AnyCheck
from probes.card import Format, Stage
from serving.engine.flagged import Flagged, flagged_by
from serving.engine.records import Record

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True)
class Ending:
    """What the API process knows of the end of a request.

    Attributes:
        request_id: the engine's own.
        client_request_id: the client's; None where the engine alone has spoken of the request.
        prompt: its tokens; None likewise.
        reply: tokens as the model wrote them; None likewise.
        finish_reason: as the client is told; None likewise.
        tenant: whose API key it came with; None where nobody tells.
        tell: is told the event and the client's id, at once; None: nobody.
    """

    request_id: str
    client_request_id: str | None = None
    prompt: TokenIds | None = None
    reply: TokenIds | None = None
    finish_reason: str | None = None
    tenant: str | None = None
    tell: Callable[[Decision, str | None], None] | None = None


class Ledger:
    """The events of one API process.

    Args:
        plan: what runs first.
        writer: where they go: to the audit trail, to sinks, or both.
        texts: which texts are kept.
        decode: makes text of tokens; called in the threads of those who write.
    """

    def __init__(self, plan: Plan, writer: Outlet, texts: KeptTexts, decode: Callable[[TokenIds], str]) -> None:
        self._current = plan.digest
        self._writer = writer
        self._texts = texts
        self._decode = decode
        self._flags: Callable[[Flagged], None] | None = None
        self._artifacts: dict[tuple[str, str], dict[str, str]] = {}

    def tell_flags(self, take: Callable[[Flagged], None]) -> None:
        """From now on, say which requests a rule has fired on."""
        self._flags = take

    def ended(self, record: Record, ending: Ending) -> Ticket | None:
        """A request has ended.

        Returns: the ticket that its response has to wait for, if any.
        """
        record.entered = True
        event = self._decision(record, ending)
        if ending.tell is not None:
            ending.tell(event, ending.client_request_id)
        about = Content(request_id=ending.request_id, client_request_id=ending.client_request_id, tenant=ending.tenant)
        if self._flags is not None and event.rules:
            names = (rule.name for rule in event.rules)
            flagged = flagged_by(record.plan, record, about, event.id, names)
            if flagged is not None:
                self._flags(flagged)
        if not self._texts.keeps(flagged=event.action is not Action.ALLOW or bool(event.rules)):
            return self._writer.submit(event, lambda: about)
        # Decoded once, by whichever outlet comes first.
        return self._writer.submit(event, functools.cache(lambda: self._with_texts(about, ending)))

    def noticed(
        self, event: ConversationFired | ProbingSuspected, request_id: str, tenant: str | None
    ) -> Ticket | None:
        """Something showed over several requests.

        Args:
            event: that says what.
            request_id: of the last one of them.
            tenant: whose; None where nobody tells.
        Returns: the ticket that its response has to wait for, if any.
        """
        about = Content(request_id=request_id, tenant=tenant)
        return self._writer.submit(event, lambda: about)

    def explained(self, event: Explanation, flagged: Flagged, tokens: TokenIds) -> None:
        """A flagged request was explained.

        Args:
            event: what was found.
            flagged: of which request.
            tokens: one for each that is told; kept where single tokens may be.
        """

        def about() -> Content:
            if not self._texts.keeps_pieces:
                return flagged.about
            return flagged.about.model_copy(update={"tokens": tuple(self._decode([token]) for token in tokens)})

        self._writer.submit(event, about)

    def gaps(self, gaps: Mapping[str, int]) -> None:
        """A step has left positions unscored, by reason."""
        self._writer.submit(GapSeen(plan=self._current, gaps={Gap(reason): count for reason, count in gaps.items()}))

    def handled(self, rule: HandledRule, outcome: Outcome) -> Ticket | None:
        """A rule that withholds was carried out behind the engine.

        Returns: the ticket that the response has to wait for, if any.
        """
        event = Handled(plan=self._current, policy=rule.policy, rule=rule.name, action=rule.action, outcome=outcome)
        return self._writer.submit(event, lambda: Content(request_id=rule.request_id))

    def canary_failed(self, failure: Failed) -> None:
        """A round of canaries has not passed."""
        self._writer.submit(CanaryFailed(plan=self._current, reason=failure.reason, detail=failure.detail))

    def policy_reloaded(self, event: PolicyReloaded) -> None:
        """Another policy was to be put in force. If it was, what follows is said of it."""
        if event.outcome is ReloadOutcome.APPLIED and event.plan is not None:
            self._current = event.plan
            self._artifacts.clear()
        self._writer.submit(event)

    def _artifacts_of(self, plan: Plan, policy: CompiledPolicy) -> dict[str, str]:
        key = plan.digest, policy.name
        if key not in self._artifacts:
            self._artifacts[key] = artifacts_of(plan, policy)
        return self._artifacts[key]

    def _decision(self, record: Record, ending: Ending) -> Decision:
        plan = record.plan
        policy = plan.policies[record.policy]
        account = record.account()
        skips = {skip: account[skip.value] for skip in Skip if skip.value in account}
        gaps = {gap: account[gap.value] for gap in Gap if gap.value in account}
        decided = record.decided
        return Decision(
            plan=plan.digest,
            policy=policy.name,
            artifacts=self._artifacts_of(plan, policy),
            format=record.fmt,
            action=ActionCode(decided.action).action if decided is not None else Action.ALLOW,
            rule=decided.rule if decided is not None else None,
            rules=self._rules(record, policy),
            verdicts=tuple(self._verdict(record, position, ending) for position in policy.checks),
            coverage=CoverageRecord(
                positions=record.scored + sum(account.values()), scored=record.scored, skipped=skips, gaps=gaps
            ),
            noticed=tuple(PromptEvent(event) for event in record.events),
            steers=tuple(
                SteerRecord(
                    name=plan.steering.steers[item.steer].name,
                    tokens=item.tokens,
                    mean=_finite(item.mean),
                    largest=_finite(item.largest),
                )
                for item in record.steered
            ),
            prompt_tokens=len(ending.prompt) if ending.prompt is not None else None,
            reply_tokens=len(ending.reply) if ending.reply is not None else None,
            finish_reason=ending.finish_reason,
        )

    def _rules(self, record: Record, policy: CompiledPolicy) -> tuple[ActedRule, ...]:
        acted = set(record.trail.acted) if record.trail is not None else set()
        outside = set(record.trail.outside) if record.trail is not None else set()
        named = [
            ActedRule(name=rule.name, action=rule.action, mode=Mode.SHADOW if rule.name in outside else rule.mode)
            for rule in policy.rules
            # Of a reply that ended here, at a stop string, the engine has not said yet which rules fire at its end.
            if rule.name in acted or (record.fired and record.truth(rule.condition) is True)
        ]
        reserved = (
            (ON_GAP, policy.on_gap),
            (ON_UNCALIBRATED, policy.on_uncalibrated),
            (ON_SESSION_FAILURE, record.plan.on_session_failure),
        )
        named += [ActedRule(name=name, action=does, mode=Mode.ENFORCE) for name, does in reserved if name in acted]
        return tuple(named)

    def _verdict(self, record: Record, position: int, ending: Ending) -> Verdict:
        check = record.plan.checks[position]
        statistic = record.statistics[position] if record.statistics else -math.inf
        fired = bool(record.fired[position]) if record.fired else False
        return Verdict(
            detector=check.detector,
            stage=check.stage,
            aggregate=check.statistic,
            segments=check.segments,
            statistic=_finite(statistic),
            threshold=_finite(_threshold(check, record.fmt, ending)),
            fired=fired,
            fired_at=record.trail.fired_at.get(position) if record.trail is not None else None,
        )

    def _with_texts(self, about: Content, ending: Ending) -> Content:
        try:
            texts = {
                name: self._texts.redacted(self._decode(tokens))
                for name, tokens in (("prompt", ending.prompt), ("reply", ending.reply))
                if tokens is not None
            }
        except RedactionError as error:
            return about.model_copy(update={"withheld": str(error)})
        return about.model_copy(update=texts)


def artifacts_of(plan: Plan, policy: CompiledPolicy) -> dict[str, str]:
    """SHA-256 of the tensors of each detector that a policy reads or watches."""
    read = (plan.checks[position] for position in policy.checks)
    names = {check.detector for check in read if isinstance(check, Check)}
    return {name: plan.cards[name].tensors_digest for name in sorted(names)}


def _finite(number: float | None) -> float | None:
    """JSON has no word for the others."""
    return number if number is not None and math.isfinite(number) else None


def _threshold(check: AnyCheck, fmt: Format, ending: Ending) -> float | None:
    """Above which it fires; by the prompt's length where that decides, else the lowest of all lengths."""
    limits = check.by_length.get(fmt)
    if limits is not None and check.stage is Stage.PROMPT and ending.prompt is not None:
        return limits.at(max(0, len(ending.prompt) - check.skip_first))
    return check.thresholds.get(fmt)
