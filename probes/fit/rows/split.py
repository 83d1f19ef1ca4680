"""Who stands on which side: held-out benign rows, negatives matched in form and length, folds by source."""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from probes.fit.rows.example import Example

__all__ = [
    "Fold",
    "hold_out",
    "length_matched_pairs",
    "make_folds",
    "make_source_folds",
    "match_negatives",
    "vary_form",
]

_LENGTH_STEP = 12
_LONG = 240
_STEPS_PER_OCTAVE = 6
"""Of texts with more characters than that: steps of 12 % find few partners, of 12 characters none."""
_MAX_POSITIVE_GROUPS = 8
_HASHED_FOLDS = 5
_IMPERATIVES = frozenset(
    {"compose", "conduct", "construct", "create", "define", "demonstrate", "describe", "design", "develop", "draft"}
    | {"explain", "generate", "give", "illustrate", "instruct", "offer", "outline", "produce", "provide", "share"}
    | {"show", "suggest", "summarize", "teach", "tell", "write"}
)


@dataclass(frozen=True, slots=True)
class Fold:
    """One split of training rows, by index.

    Attributes:
        name: the held-out group of positives.
        train: indices of the rows to fit on.
        test: indices of the rows to score.
    """

    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]


def hold_out(examples: Iterable[Example], share: float, *, salt: str) -> tuple[list[Example], list[Example]]:
    """Split by group: (kept, held out); a group's side depends on its name and ``salt`` alone."""
    kept: list[Example] = []
    held: list[Example] = []
    for example in examples:
        (held if _unit_hash(f"{salt}/{example.group}") < share else kept).append(example)
    return kept, held


def vary_form(examples: Sequence[Example], share: float, rng: random.Random) -> list[Example]:
    """Rewrite the surface of a share of the rows, by the same rules whatever their label.

    "Write X" may become "Can you write X?" or "Please write X."; a question may lose its mark. So neither mood nor
    punctuation says anything about the label. Rows with several messages or a response stay as they are.
    """
    return [
        replace(example, text=_varied(example.text, rng))
        if not example.turns and not example.response and rng.random() < share
        else example
        for example in examples
    ]


def match_negatives(
    positives: Sequence[Example], negatives: Sequence[Example], ratio: float, rng: random.Random
) -> list[Example]:
    """Negatives with the positives' distribution over form and length, their sources taking turns.

    In each cell (question or not, length in steps of 12 characters, of about a tenth in long texts) at most ``ratio``
    times as many negatives as positives are taken, from the same cell; where it has too few, there are fewer.
    """
    wanted: dict[tuple[bool, int], int] = defaultdict(int)
    for example in positives:
        wanted[_cell(example.judged)] += 1
    pools: dict[tuple[bool, int], dict[str, list[Example]]] = defaultdict(lambda: defaultdict(list))
    for example in negatives:
        pools[_cell(example.judged)][example.source].append(example)
    chosen: list[Example] = []
    for cell in sorted(wanted):
        ordered = _in_turns(pools[cell], rng)
        chosen += ordered[: round(ratio * wanted[cell])]
    return chosen


def make_folds(examples: Sequence[Example], rng: random.Random) -> list[Fold]:
    """Leave one source of positives out; the negatives of a fold are held out by group and matched in form.

    With more than eight groups of positives, or one alone, they are dealt into five folds by their hash.
    """
    positive_groups = sorted({example.group for example in examples if example.label})
    by_name = 1 < len(positive_groups) <= _MAX_POSITIVE_GROUPS
    names = positive_groups if by_name else [f"part-{i}" for i in range(_HASHED_FOLDS)]
    if len(positive_groups) == 1:
        place = {i: int(_unit_hash(example.text) * len(names)) for i, example in enumerate(examples)}
    else:
        place = {
            i: names.index(example.group)
            if example.label and by_name
            else int(_unit_hash(f"fold/{example.group}") * len(names))
            for i, example in enumerate(examples)
        }
    folds = []
    for number, name in enumerate(names):
        held = [i for i in place if place[i] == number]
        train = tuple(i for i in place if place[i] != number)
        positives = [i for i in held if examples[i].label]
        if not positives or not any(examples[i].label for i in train):
            continue
        index = {id(examples[i]): i for i in held}
        matched = match_negatives(
            [examples[i] for i in positives], [examples[i] for i in held if not examples[i].label], 2.0, rng
        )
        test = tuple(positives + [index[id(example)] for example in matched])
        folds.append(Fold(name, train, test))
    return folds


def make_source_folds(examples: Sequence[Example], rng: random.Random) -> list[Fold]:
    """Leave one whole set out, its positives and its negatives, and fit on all the others.

    Sets with one label alone are always fitted on.
    """
    labels: dict[str, set[int]] = defaultdict(set)
    for example in examples:
        labels[example.source].add(example.label)
    folds = []
    for source in sorted(name for name, found in labels.items() if found == {0, 1}):
        train = tuple(i for i, example in enumerate(examples) if example.source != source)
        if len({examples[i].label for i in train}) < 2:  # noqa: PLR2004 - both labels
            continue
        positives, negatives = (
            [i for i, example in enumerate(examples) if example.source == source and example.label == label]
            for label in (1, 0)
        )
        index = {id(examples[i]): i for i in negatives}
        matched = match_negatives([examples[i] for i in positives], [examples[i] for i in negatives], 2.0, rng)
        folds.append(Fold(source, train, tuple(positives + [index[id(example)] for example in matched])))
    return folds


def length_matched_pairs(examples: Sequence[Example], tolerance: float) -> list[Example]:
    """The largest part of a set with one negative for each positive, their lengths within ``tolerance`` of each other.

    Args:
        examples: both labels.
        tolerance: greatest difference in characters, as a share of the longer text.
    """
    positives = sorted((e for e in examples if e.label), key=lambda e: (len(e.judged), e.judged))
    negatives = sorted((e for e in examples if not e.label), key=lambda e: (len(e.judged), e.judged))
    kept: list[Example] = []
    place = 0
    for positive in positives:
        while place < len(negatives) and len(negatives[place].judged) < len(positive.judged) * (1 - tolerance):
            place += 1
        if place == len(negatives):
            break
        if len(negatives[place].judged) * (1 - tolerance) <= len(positive.judged):
            kept += [positive, negatives[place]]
            place += 1
    return kept


def _cell(text: str) -> tuple[bool, int]:
    steps = len(text) // _LENGTH_STEP
    if len(text) > _LONG:
        steps = _LONG // _LENGTH_STEP + round(_STEPS_PER_OCTAVE * math.log2(len(text) / _LONG))
    return text.endswith("?"), steps


def _in_turns(by_source: Mapping[str, list[Example]], rng: random.Random) -> list[Example]:
    columns = []
    for source in sorted(by_source):
        column = list(by_source[source])
        rng.shuffle(column)
        columns.append(column)
    return [example for row in zip_longest(*columns) for example in row if example is not None]


def _varied(text: str, rng: random.Random) -> str:
    if text.endswith("?"):
        return rng.choice((text[:-1], text[:-1], text[0].lower() + text[1:], text[0].lower() + text[1:-1]))
    first = text.split(maxsplit=1)[0].lower() if text else ""
    if first not in _IMPERATIVES:
        return text if text.endswith(".") else f"{text}."
    lowered = text[0].lower() + text[1:].rstrip(".")
    forms = (
        f"Please {lowered}.",
        f"Can you {lowered}?",
        f"How do I {lowered}?",
        f"How can I {lowered}?",
        f"Could you {lowered}?",
        f"I want you to {lowered}.",
        f"Help me {lowered}",
        f"{text.rstrip('.')}.",
        lowered,
    )
    return rng.choice(forms)


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64
