"""Friendly words around requests."""

# ruff: noqa: S311 - seeded draws of examples
import random

import numpy as np
import pytest

from probes.fit.rows.example import Example
from probes.fit.rows.small_talk import _ENDINGS, UNSEEN_ENDINGS, add_small_talk


def rows(count: int = 600) -> list[Example]:
    return [Example(text=f"Do {i}", label=i % 2, source="s", group=str(i)) for i in range(count)]


def test_both_labels_get_the_same() -> None:
    before = rows()
    after = add_small_talk(before, 0.5, random.Random(0))
    assert after == add_small_talk(before, 0.5, random.Random(0))
    changed = np.array([a.text != b.text for a, b in zip(after, before, strict=True)])
    labels = np.array([row.label for row in before])
    assert changed.mean() == pytest.approx(0.5, abs=0.06)
    assert changed[labels == 1].mean() == pytest.approx(changed[labels == 0].mean(), abs=0.1)
    assert all(
        b.text in a.text and (a.label, a.group) == (b.label, b.group) for a, b in zip(after, before, strict=True)
    )


def test_without_a_share_nothing_is_drawn() -> None:
    rng = random.Random(0)
    assert add_small_talk(rows(), 0, rng) == rows()
    assert rng.random() == random.Random(0).random()


def test_conversations_and_replies_stay_as_they_are() -> None:
    talks = [
        Example(text="b", label=0, source="s", group="g", turns=(("user", "a"), ("assistant", "c"), ("user", "b"))),
        Example(text="b", label=0, source="s", group="g", response="c"),
    ]
    assert add_small_talk(talks, 1.0, random.Random(0)) == talks


def test_endings_for_tests_are_never_used() -> None:
    assert not set(UNSEEN_ENDINGS) & set(_ENDINGS)


def test_messages_stand_around_both_labels_alike() -> None:
    before, said = rows(), [f"My cat has {i} kittens." for i in range(5)]
    after = add_small_talk(before, 0.5, random.Random(0), messages=said)
    beside = np.array([any(text in row.text for text in said) for row in after])
    labels = np.array([row.label for row in before])
    assert beside.mean() == pytest.approx(0.2, abs=0.05)
    assert beside[labels == 1].mean() == pytest.approx(beside[labels == 0].mean(), abs=0.06)
    assert all(b.text in a.text and a.label == b.label for a, b in zip(after, before, strict=True))
    places = {row.text.startswith("My cat") for row, here in zip(after, beside, strict=True) if here}
    assert places == {True, False}
