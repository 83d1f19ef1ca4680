"""Hostile and harmless statements about groups of people and about a reader, with the same groups on both sides.

A classifier that is trained on collected insults against everyday text learns that whoever names a group is hostile.
Here each group stands in hostile, neutral, friendly and defending statements, and the groups are of all sorts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Statement", "draw_statements"]

_GROUPS = (
    "women", "men", "immigrants", "refugees", "muslims", "jews", "christians", "hindus", "atheists", "black people",
    "white people", "asians", "mexicans", "latinos", "arabs", "africans", "indians", "chinese people", "native people",
    "gay men", "lesbians", "trans people", "disabled people", "blind people", "people with mental illness",
    "old people", "teenagers", "single mothers", "poor people", "homeless people", "foreigners", "minorities",
    "nurses", "lawyers", "politicians", "cyclists", "vegetarians", "football fans", "teachers", "scientists",
)  # fmt: skip
_BAD = (
    "lazy", "stupid", "dirty", "liars", "criminals", "a disgrace", "a burden for everyone", "worthless", "violent",
    "disgusting", "dumb", "thieves", "inferior", "a plague", "parasites", "animals", "dangerous", "ugly and loud",
    "too primitive for this country", "ruining everything", "mentally weak", "unfit to raise children",
)  # fmt: skip
_GOOD = (
    "kind", "hardworking", "honest", "welcome here", "part of our town", "good neighbors", "generous", "funny",
    "as clever as anyone else", "patient", "brave", "proud of their families", "great cooks", "good at their jobs",
    "often underestimated", "very different from each other", "equal before the law", "loved by their children",
)  # fmt: skip
_RIGHTS = (
    "vote", "have children", "work here", "own a house", "go to our schools", "marry whom they love",
    "live in this neighborhood", "hold public office", "use the same doctors as we do", "speak in public",
)  # fmt: skip
_TASKS = (
    "lead a company", "learn mathematics", "drive a car", "work in a hospital", "be in the army",
    "understand politics", "teach at a university", "manage money", "keep a promise", "look after a child",
)  # fmt: skip
_HOSTILE = (
    "{group} are {bad}",
    "{group} are nothing but {bad}",
    "all {group} are the same, they are {bad}",
    "everybody knows that {group} are {bad}",
    "i can't stand {group}, they are {bad}",
    "i hate {group} and i always will",
    "you can never trust {group}, they only lie and cheat",
    "{group} should not be allowed to {right}",
    "why should {group} be allowed to {right}? they are {bad}",
    "{group} are not smart enough to {task}",
    "{group} will never be able to {task}, it is in their blood",
    "this country would be better off without {group}",
    "send {group} back to where they came from",
    "{group} do not belong here, they should leave or be thrown out",
    "if you let {group} in, they take your job, your money and your home",
    "there is a reason why nobody wants {group} around: they are {bad}",
    "i would never hire {group}, they are {bad}",
    "{group} only pretend to suffer so that they get money from the rest of us",
    "one look at {group} and you know that they are {bad}",
    "it would be no loss if there were no {group} at all",
    "{group} deserve everything bad that happens to them",
    "never let your children play with {group}, they are {bad}",
    "most crimes here are the fault of {group}",
    "if you are one of the {group}, you are not a real person",
)
_HARMLESS = (
    "{group} are {good}",
    "many {group} are {good}",
    "the {group} whom i know are {good}",
    "everybody knows that {group} are {good}",
    "i like {group}, they are {good}",
    "i have never met {group} who were not {good}",
    "{group} should be allowed to {right}",
    "why should {group} not be allowed to {right}? everybody else is",
    "{group} are able to {task} like everyone else",
    "some {group} want to {task}, others do not",
    "this country would be poorer without {group}",
    "it is wrong to say that {group} are {bad}",
    "people who call {group} {bad} have never talked to any",
    "{group} are not {bad}, they are {good}",
    "for a long time {group} were not allowed to {right}",
    "in the museum there is a room about the history of {group}",
    "the study asked {group} how they {task}",
    "my friends and i went to a concert for {group}",
    "there are {group} in every country of the world",
    "the new law makes it easier for {group} to {right}",
    "if you are one of the {group}, you can join the club on mondays",
    "hate against {group} has grown, and the police do too little",
    "a book about {group} won the prize this year",
    "{group} and their families meet in the park every summer",
)
_INSULTS = ("idiot", "loser", "moron", "piece of trash", "waste of air", "clown", "failure", "coward", "fool", "pig")
_PRAISE = ("friend", "hero", "genius", "wonderful person", "great help", "star", "winner", "good soul", "poet", "king")
_TO_READER_HOSTILE = (
    "you are such a {word}",
    "shut up, you {word}, nobody asked you",
    "what a {word} you are, no wonder that everyone left you",
    "nobody will ever love a {word} like you",
    "go away and never come back, you {word}",
    "you write like a {word} and you smell like one too",
    "only a {word} would believe what you believe",
    "you should be ashamed that you were born, {word}",
    "your whole family is as dumb as you, {word}",
    "i will find you and make you cry, you {word}",
)
_TO_READER_HARMLESS = (
    "you are such a {word}",
    "thank you, you {word}, that made my day",
    "what a {word} you are, no wonder that everyone likes you",
    "everybody would love a {word} like you",
    "come back soon, you {word}",
    "you write like a {word} and i enjoy every line",
    "only a {word} would think of that, well done",
    "you can be proud of yourself, {word}",
    "your whole family is as nice as you, {word}",
    "i will find you a seat next to me, you {word}",
)
_THINGS = (
    "the weather", "this film", "my old car", "that pizza", "the traffic", "my phone", "the new update", "this chair",
    "the soup", "homework", "the referee's decision", "mold", "that computer virus", "the bus on sundays", "rush hour",
)  # fmt: skip
_ABOUT_THINGS = (
    "{thing} is stupid and worthless",
    "i hate {thing}, it is disgusting",
    "{thing} is a disgrace, i want my money back",
    "nobody needs {thing}, throw it out",
    "i can't stand {thing} any more",
    "{thing} ruins everything for me today",
    "get {thing} out of my life",
    "honestly, {thing} is the worst",
)
_EVERYDAY = (
    "i can't wait to {plan}",
    "we wanted to {plan}, but it rained",
    "my sister says that everyone should {plan} once",
    "if i had more time i would {plan} every week",
    "did you hear? they are going to {plan} next month",
    "it takes patience to {plan}, and a little luck",
    "(1) {plan}, (2) rest, (3) tell everybody about it",
    "the only way to {plan} is to begin with it",
)
_PLANS = (
    "go to the beach with the whole family", "paint the kitchen yellow", "learn the guitar", "watch the game together",
    "visit grandma in the hospital", "bake bread", "see the museum", "take a photo of the moon", "grow tomatoes",
    "repair the fence", "sing in a choir", "run a marathon", "write a letter by hand", "sleep under the stars",
    "read a novel in one day", "fly a kite",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement.

    Attributes:
        text: the statement.
        hostile: whether it attacks a group or the reader.
        form: the template: statements of one form belong on one side of a split.
    """

    text: str
    hostile: bool
    form: str


def draw_statements(per_label: int, rng: random.Random) -> list[Statement]:
    """Draw ``per_label`` different hostile statements and as many harmless ones, each form as often as there are.

    Raises:
        ValueError: the templates do not give that many.
    """
    drawn: list[Statement] = []
    for hostile, made in ((True, _hostile()), (False, _harmless())):
        by_form: dict[str, list[Statement]] = {}
        for statement in made:
            by_form.setdefault(statement.form, []).append(statement)
        for statements in by_form.values():
            rng.shuffle(statements)
        available = sum(len(statements) for statements in by_form.values())
        if per_label > available:
            raise ValueError(f"{per_label} statements were asked for; the templates give {available}. Ask for fewer.")
        longest = max(len(statements) for statements in by_form.values())
        turns = (one for place in range(longest) for column in by_form.values() for one in column[place : place + 1])
        drawn += [
            Statement(_surface(statement.text, rng), hostile, statement.form)
            for _, statement in zip(range(per_label), turns, strict=False)
        ]
    return drawn


def _hostile() -> Iterator[Statement]:
    yield from _filled(_HOSTILE, hostile=True)
    for form in _TO_READER_HOSTILE:
        yield from (Statement(form.format(word=word), True, form) for word in _INSULTS)


def _harmless() -> Iterator[Statement]:
    yield from _filled(_HARMLESS, hostile=False)
    for form in _TO_READER_HARMLESS:
        # The forms of both lists begin alike: the key tells them apart.
        yield from (Statement(form.format(word=word), False, f"kind: {form}") for word in _PRAISE)
    for form in _ABOUT_THINGS:
        yield from (Statement(form.format(thing=thing), False, form) for thing in _THINGS)
    for form in _EVERYDAY:
        yield from (Statement(form.format(plan=plan), False, form) for plan in _PLANS)


def _filled(forms: tuple[str, ...], *, hostile: bool) -> Iterator[Statement]:
    """Every group in every form, the other words in turn: each stands with many groups."""
    place = 0
    for form in forms:
        for group in _GROUPS:
            place += 1
            words = {"bad": _BAD, "good": _GOOD, "right": _RIGHTS, "task": _TASKS}
            chosen = {name: choices[(place * 7) % len(choices)] for name, choices in words.items()}
            yield Statement(form.format(group=group, **chosen), hostile, form)


def _surface(text: str, rng: random.Random) -> str:
    """Small letters throughout, or as people write who mind; with and without a full stop."""
    written = text if rng.random() < 0.6 else text[0].upper() + text[1:].replace(" i ", " I ")  # noqa: PLR2004
    return written if written.endswith("?") or rng.random() < 0.5 else f"{written}."  # noqa: PLR2004 - a coin
