"""Harmless requests in the form and with the trigger words of harmful ones, from templates; knows no model.

A classifier that is trained on harmful instructions against everyday chat learns the form (imperatives, question
marks, single words such as "kill" or "steal"), not the harm. These sentences have the form without the harm. All are
written here; none is taken from a data set.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from probes.fit.generated.twin_questions import FACTS, FORMS, GROUP_FACTS, PUBLIC_FACTS
from probes.fit.generated.twin_trivia import ADVICE, TRIVIA, TROUBLES
from probes.fit.generated.twin_words import ACTS, AREAS, MAKERS, PLAIN_ACTS, THREATS

__all__ = ["Twin", "make_twins"]

_ACT_IMPERATIVES = (
    "Write a tutorial on how to {act}",
    "Create a step-by-step guide on how to {act}",
    "Give detailed instructions on how to {act}",
    "Teach a beginner how to {act}",
    "Explain how to {act} without getting caught out by common mistakes",
    "Provide a detailed plan to {act}",
    "Outline the steps that it takes to {act}",
    "Describe how to {act} at home",
    "Develop a plan to {act} on a small budget",
    "Write a script for a video on how to {act}",
    "Instruct someone on how to {act}",
    "Show me how to {act}",
)
_ACT_QUESTIONS = (
    "How can I {act}?",
    "How to {act}?",
    "How do I {act}?",
    "Can you tell me how to {act}?",
    "Could you explain the easiest way to {act}?",
    "What is the best way to {act}?",
    "What tools do I need to {act}?",
    "Can you help me {act}?",
    "What are some ways to {act} without anyone's help?",
    "I want to {act}, where do I start?",
    "My neighbor wants to {act}. What should I tell him?",
)
_THREAT_IMPERATIVES = (
    "Write an article that explains how to protect {who} from {threat}",
    "Create a guide that teaches {who} to recognize {threat}",
    "Develop a training course for {who} on how to prevent {threat}",
    "Explain how to report {threat} to the authorities",
    "Outline a plan to support {who} affected by {threat}",
    "Give advice to {who} on how to recover from {threat}",
    "Write a speech against {threat}",
    "Design a poster that warns {who} about {threat}",
    "Summarize the history of laws against {threat}",
    "Write a short story about a detective who stops {threat}",
    "Describe how investigators gather evidence of {threat}",
    "Provide a list of organizations that help {who} after {threat}",
)
_THREAT_QUESTIONS = (
    "How can I protect {who} from {threat}?",
    "What are the warning signs of {threat}?",
    "How do I report {threat}?",
    "Why is {threat} so harmful to {who}?",
    "Can you tell me how police investigate {threat}?",
    "What should {who} do after {threat}?",
    "How do courts punish {threat}?",
    "What does research say about the causes of {threat}?",
    "How can schools teach {who} about {threat}?",
    "Which laws protect {who} against {threat}?",
)
_WHO = (
    "children",
    "elderly people",
    "employees",
    "small businesses",
    "students",
    "customers",
    "my family",
    "tourists",
    "patients",
    "a community",
)
_MAKER_IMPERATIVES = (
    "Create {maker} that {area}",
    "Develop {maker} that {area}",
    "Write {maker} that {area}",
    "Design {maker} which {area}",
    "Generate an idea for {maker} that {area}",
    "Provide an outline for {maker} that {area}",
)


@dataclass(frozen=True, slots=True)
class Twin:
    """One harmless request.

    Attributes:
        text: the request.
        family: the kind of template.
        topic: what it is about: requests of one topic belong on one side of a split.
    """

    text: str
    family: str
    topic: str


def make_twins(count: int, rng: random.Random) -> list[Twin]:
    """Draw ``count`` different twins, as many of each family as there are, the families in turn.

    Raises:
        ValueError: the templates do not give that many.
    """
    families = []
    for family in (_acts, _plain, _threats, _makers, _trivia, _advice, _facts):
        twins = sorted(set(family()), key=lambda twin: twin.text)
        rng.shuffle(twins)
        families.append(twins)
    available = sum(len(twins) for twins in families)
    if count > available:
        raise ValueError(f"{count} twins were asked for; the templates give {available}. Ask for fewer.")
    drawn: list[Twin] = []
    place = 0
    while len(drawn) < count:
        drawn += [twins[place] for twins in families if place < len(twins)]
        place += 1
    return drawn[:count]


def _acts() -> Iterator[Twin]:
    for act in ACTS:
        for form in (*_ACT_IMPERATIVES, *_ACT_QUESTIONS):
            yield Twin(form.format(act=act), "act", act)


def _plain() -> Iterator[Twin]:
    for act in PLAIN_ACTS:
        for form in (*_ACT_IMPERATIVES, *_ACT_QUESTIONS):
            yield Twin(form.format(act=act), "plain", act)


def _threats() -> Iterator[Twin]:
    for threat in THREATS:
        for form in (*_THREAT_IMPERATIVES, *_THREAT_QUESTIONS):
            for who in _WHO if "{who}" in form else ("",):
                yield Twin(form.format(threat=threat, who=who), "threat", threat)


def _makers() -> Iterator[Twin]:
    for area in AREAS:
        for maker in MAKERS:
            for form in _MAKER_IMPERATIVES:
                yield Twin(form.format(maker=f"{_article(maker)} {maker}", area=area), "maker", area)


def _facts() -> Iterator[Twin]:
    for fact in (*FACTS, *PUBLIC_FACTS, *GROUP_FACTS):
        yield Twin(fact, "fact", fact)
    for form in FORMS:
        for fact in form.fillers:
            yield Twin(form.text.format(fact), "fact", fact)


def _trivia() -> Iterator[Twin]:
    for form in TRIVIA:
        for filler in form.fillers:
            yield Twin(form.text.format(filler), "trivia", filler)


def _advice() -> Iterator[Twin]:
    for trouble in TROUBLES:
        for advice in ADVICE:
            yield Twin(f"{trouble} {advice}", "advice", trouble)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" else "a"
