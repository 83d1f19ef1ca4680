"""What a rule of a policy does, in words."""

from __future__ import annotations

import math

from monitor.attempt import Holds
from monitor.compiled import CompiledRule
from monitor.condition import AllOf, Condition, NotOf, Verdict
from monitor.handling import Handling
from monitor.policy import Plan
from monitor.rollout import Share, Subject
from monitor.session import Conversation
from monitor.types import Action, Mode
from monitor.verdicts import AnyCheck
from probes.card import Stage

_KNOWN = {
    Stage.PROMPT: "before the first token",
    Stage.STREAM: "at the token that shows it",
    Stage.RESPONSE: "when the reply has ended",
}


_COSTS = {
    Holds.PROMPT: "A stream begins once the prompt has been judged; if the rule fires, nothing is sent before it is "
    "carried out.",
    Holds.REPLY: "Nothing of a stream is sent before its reply has ended: the first token waits for the last.",
}


def explain(rule: CompiledRule, plan: Plan) -> str:
    """One sentence: what is done, if what, and when that is known.

    Args:
        rule: of a policy.
        plan: that it belongs to.
    """
    if rule.conversation is not None:
        return _of_conversation(rule, rule.conversation, plan)
    stages = {plan.checks[number].stage for number in rule.verdicts}
    if rule.waits_for_end(plan.checks):
        stages.add(Stage.RESPONSE)
    latest = next(stage for stage in reversed(Stage) if stage in stages)
    when = _KNOWN[latest] if len(stages) == 1 else f"{_KNOWN[latest]} at the latest"
    done = f"would {rule.action.value}" if rule.mode is Mode.SHADOW else f"{rule.action.value}s"
    sentences = [f"{rule.name} {done}, {when}, if {in_words(rule.condition, plan)}."]
    if rule.handling is not None:
        sentences.append(handling_in_words(rule, rule.handling, plan))
    if rule.share is not None:
        sentences.append(f"For {share_in_words(rule.share)}; else in shadow.")
    if rule.holds is not Holds.NOTHING:
        sentences.append(_COSTS[rule.holds])
    return " ".join(sentences)


def handling_in_words(rule: CompiledRule, handling: Handling, plan: Plan) -> str:
    """What is done behind the engine, and what if that fails."""
    do = handling.do
    if do.action is Action.REGENERATE:
        how = f"with the steer {do.steer}" if do.steer is not None else "under another system prompt"
        again = f"The model answers once more {how}"
        if rule.holds is Holds.PROMPT:
            return f"{again}."
        both = "the one with the lower statistic" if handling.releases_the_better else "the refusal"
        return f"{again}; if the rule fires on both replies, {both} is sent."
    to = handling.to
    if do.action is Action.ROUTE:
        where = f"{to.upstream}, unread" if to.upstream is not None else f"the model {to.model}"
        return f"The answer comes from {where}; if that fails, the refusal is sent."
    if handling.probe is not None:
        asked = f"The refusal is sent if {in_words(handling.probe, plan)}"
    else:
        who = "The served model" if to.judge is not None else to.classifier
        often = f", at most {handling.budget} a minute" if handling.budget is not None else ""
        asked = f"{who} is asked, for at most {handling.timeout:g} s{often}; if it flags the text, the refusal is sent"
    return f"{asked}; without an answer: {handling.on_failure.value}."


def _of_conversation(rule: CompiledRule, conversation: Conversation, plan: Plan) -> str:
    done = f"would {rule.action.value}" if rule.mode is Mode.SHADOW else f"{rule.action.value}s"
    whose = "session as its client names it" if conversation.by is Subject.SESSION else "tenant"
    lasts = "until it ends" if math.isinf(conversation.lasts) else f"for {conversation.lasts:g} s"
    sentence = (
        f"{rule.name} {done} the next requests of a {whose}, {lasts}, once {conversation.accumulator} over its "
        f"requests of {verdict_in_words(plan.checks[conversation.check])} lies above {conversation.threshold:g}."
    )
    if conversation.by is Subject.SESSION:
        sentence += " A client that names another session, or none, is not the same one to it."
    return sentence if rule.share is None else f"{sentence} For {share_in_words(rule.share)}; else in shadow."


def share_in_words(share: Share) -> str:
    """For whom a rule is enforced."""
    return f"{share.percent:g} % by {share.by.value}"


def in_words(condition: Condition, plan: Plan) -> str:
    """A condition, with brackets where it takes some to tell ``and`` from ``or``."""
    match condition:
        case Verdict():
            return verdict_in_words(plan.checks[condition.number])
        case NotOf():
            return f"not ({in_words(condition.part, plan)})"
        case _:
            joint = " and " if isinstance(condition, AllOf) else " or "
            return joint.join(
                in_words(part, plan) if isinstance(part, Verdict | NotOf) else f"({in_words(part, plan)})"
                for part in condition.parts
            )


def verdict_in_words(check: AnyCheck) -> str:
    """A verdict: what is read where; above what it fires stands in the table."""
    of = f" of {', '.join(role.value for role in check.segments)}" if check.segments is not None else ""
    return f"{check.detector} ({check.statistic} at {check.stage.value}{of})"
