"""One labelled request and what makes two of them the same; knows no file format and no model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Example", "data_digest", "drop_list", "text_digest", "without_dropped", "without_duplicates"]

_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")
_DROP_LIST = Path(__file__).with_name("train_drop_sha256.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A request with a label.

    Attributes:
        text: what the user wrote (of several turns: the newest).
        label: 1 = what the detector is to find, 0 = anything else.
        source: the set that it came from.
        group: examples of one group never stand on two sides of a split.
        turns: (role, text) of every message where there is more than one user message; else empty.
        response: the assistant's reply, where it is what is judged; not one of ``turns``.
        language: of the text, as its source says; empty where it does not.
        onset: character of the response from which on it is what the label says; None where nobody has marked it.
    """

    text: str
    label: int
    source: str
    group: str
    turns: tuple[tuple[str, str], ...] = ()
    response: str = ""
    language: str = ""
    onset: int | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as the chat API takes it."""
        turns = self.turns or (("user", self.text),)
        return [{"role": role, "content": text} for role, text in turns]

    @property
    def judged(self) -> str:
        """The text that the label is about: the response where there is one."""
        return self.response or self.text

    @property
    def digest(self) -> str:
        """What makes two examples the same: the texts of all turns, and where there is one, the response."""
        prompt = text_digest(self.text)
        if len(self.turns) > 1:
            prompt = hashlib.sha256(" ".join(text_digest(text) for _, text in self.turns).encode()).hexdigest()
        if not self.response:
            return prompt
        return hashlib.sha256(f"{prompt} {text_digest(self.response)}".encode()).hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of the text in lower case with everything but Latin letters and digits as one space.

    Of a text without any of these, in another script, say, that of the text itself.
    """
    normal = _NOT_ALPHANUMERIC.sub(" ", text.lower()).strip()
    return hashlib.sha256((normal or text.strip()).encode()).hexdigest()


@cache
def drop_list() -> frozenset[str]:
    """Digests of texts that stand in public test sets: never trained on, tuned on or calibrated on."""
    return frozenset(_DROP_LIST.read_text(encoding="ascii").split())


def without_dropped(examples: Iterable[Example]) -> list[Example]:
    """Leave out examples whose text or response the drop list names."""
    dropped = drop_list()
    return [
        example
        for example in examples
        if text_digest(example.text) not in dropped
        and not (example.response and text_digest(example.response) in dropped)
    ]


def without_duplicates(examples: Iterable[Example], *, seen: set[str]) -> list[Example]:
    """Keep the first of all examples that are the same: one prompt may have several responses.

    Args:
        examples: in order of preference.
        seen: digests that count as present; added to.
    """
    kept = []
    for example in examples:
        digest = example.digest
        if digest not in seen:
            seen.add(digest)
            kept.append(example)
    return kept


def data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over labels, texts and responses, independent of their order."""
    lines = sorted(f"{example.label} {example.digest}\n" for example in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
