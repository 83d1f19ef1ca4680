"""Who wrote which token of a chat: found by rendering its messages once more with marks around their texts.

Nothing is told from markers in the text, which anybody can write. Knows no vLLM: it is given a way to render.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from monitor.segments import Codes, PromptMap, runs_of
from monitor.types import PromptEvent, Role
from serving.engine.marks import Marks, Message, marked_messages, role_of, trailing_from

_WORD = re.compile(r"\w")
_TEMPLATE, _USER = Role.TEMPLATE.code, Role.USER.code


@dataclass(frozen=True, slots=True)
class TextMap:
    """Who wrote which character of a rendered chat.

    Attributes:
        codes: (characters,) role codes.
        trailing: the first character of the trailing segment; None if none of it was rendered.
        certain: whether what is not marked can only come from the template.
    """

    codes: Codes
    trailing: int | None
    certain: bool


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to mark a conversation.

    Attributes:
        messages, settings: to be rendered instead of the real ones.
        marks: what was put into them.
        certain: whether every text that a client can write was marked.
    """

    messages: list[Message]
    settings: dict[str, Any]
    marks: Marks
    certain: bool

    def read(self, rendered: str, text: str) -> TextMap | None:
        """The map, if without its marks the rendered text is exactly the real one; else None."""
        if self.marks.remove(rendered) != text:
            return None
        codes, trailing = _read_marks(rendered, self.marks)
        _join_punctuation(codes, text)
        return TextMap(codes, trailing, self.certain)


def attempts(messages: Sequence[Message], settings: Mapping[str, Any], text: str) -> Iterator[Attempt]:
    """Ways to mark a conversation, the most telling one first.

    Templates may strip texts, so that marks must stand inside of the whitespace; and they may look into tool
    definitions, identifiers and settings, so that marks there would change what they do.

    Args:
        messages: as the template gets them.
        settings: the template's other variables.
        text: what it made of them.
    """
    marks = Marks.draw(text)
    tried: list[tuple[list[Message], dict[str, Any]]] = []
    for everything in (True, False):
        for inside in (False, True):
            marked = marked_messages(messages, settings, marks, everything=everything, inside=inside)
            if (marked.messages, marked.settings) not in tried:
                tried.append((marked.messages, marked.settings))
                yield Attempt(marked.messages, marked.settings, marks, marked.complete)


def search(messages: Sequence[Message], settings: Mapping[str, Any], text: str) -> TextMap | None:
    """Where no marked rendering is the real one: each text, stripped, in order; None if one of them is not there."""
    codes = np.full(len(text), _TEMPLATE, dtype=np.uint8)
    first = trailing_from(messages, settings)
    cursor, trailing = 0, None
    for number, message in enumerate(messages):
        for role, part in message_texts(message):
            stripped = part.strip()
            if not stripped:
                continue
            at = text.find(stripped, cursor)
            if at < 0:
                return None
            cursor = at + len(stripped)
            codes[at:cursor] = role.code
            if number >= first and trailing is None:
                trailing = at
    return TextMap(codes, trailing, certain=False)


def message_texts(message: Message) -> Iterator[tuple[Role, str]]:
    """The reasoning and content of a message, in the order in which templates print them."""
    role = role_of(message)
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if isinstance(reasoning, str):
        yield Role.REASONING, reasoning
    content = message.get("content")
    if isinstance(content, str):
        yield role, content
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield role, part["text"]


def prompt_map(
    found: TextMap | None,
    token_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    *,
    special: Collection[int],
    reply_is_open: bool,
) -> PromptMap:
    """Carry a map from characters over to tokens.

    Args:
        found: of the text; None if there is none.
        token_ids: (n,) what the text became; a truncated prompt has only a part of it.
        offsets: (n,) first character of each token and the one behind its last.
        special: ids of the special tokens.
        reply_is_open: whether the prompt ends inside a message, or behind one of the assistant.
    """
    if found is None or len(offsets) != len(token_ids):
        return PromptMap.unknown(stream_from=0 if reply_is_open else len(token_ids))
    spans = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
    codes = _token_codes(found.codes, spans)
    events: tuple[PromptEvent, ...] = ()
    if np.isin(np.array(token_ids, dtype=np.int64), list(special))[codes != _TEMPLATE].any():
        events = (PromptEvent.SPECIAL_TOKEN_IN_CONTENT,)
    stream_from = len(token_ids)
    if found.trailing is not None:
        stream_from = int(np.argmax(np.append(spans[:, 1] > found.trailing, True)))
    if not found.certain:
        codes[codes == _TEMPLATE] = _USER
    return PromptMap(runs_of(codes), stream_from, events)


def _token_codes(codes: Codes, spans: npt.NDArray[np.int64]) -> Codes:
    """The role of each token: of the characters that it touches, the one that stands last in ``Role``."""
    if len(spans) == 0:
        return np.zeros(0, dtype=np.uint8)
    padded = np.append(codes, np.uint8(_TEMPLATE))
    starts = np.clip(spans[:, 0], 0, len(codes))
    # A token without characters (one that the tokenizer added) is read as the character behind it, if at position 0
    # as the template's.
    ends = np.clip(np.maximum(spans[:, 1], starts + 1), 0, len(codes))
    ends = np.maximum(ends, starts)
    found = np.maximum.reduceat(padded, np.column_stack([starts, ends]).ravel())[::2]
    found[(spans[:, 1] == 0)] = _TEMPLATE
    return np.asarray(found, dtype=np.uint8)


def _read_marks(rendered: str, marks: Marks) -> tuple[Codes, int | None]:
    """Role codes of the characters between marks, and where the trailing segment begins.

    A template may cut a text at either end, and a mark with it: a text whose end mark is gone reaches to the next
    mark, one whose beginning is gone back to the mark before. That is more than it was, never less.
    """
    lengths: list[int] = []
    found: list[int] = []
    current, last, plain, trailing = _TEMPLATE, 0, 0, None
    for at, mark in marks.find(rendered):
        length = at - last
        plain, last = plain + length, at + 1
        code = current
        if mark == marks.trailing:
            if trailing is None:
                trailing = plain
        elif mark in marks.begin:
            current = marks.begin[mark]
        else:
            code = max(current, marks.end[mark])
            current = _TEMPLATE
        lengths.append(length)
        found.append(code)
    lengths.append(len(rendered) - last)
    found.append(current)
    return np.repeat(np.array(found, dtype=np.uint8), lengths), trailing


def _join_punctuation(codes: Codes, text: str) -> None:
    """What stands between two texts of one role without a letter or digit is theirs too, in place: JSON, above all."""
    edges = np.flatnonzero(np.diff(codes)) + 1
    bounds = [0, *edges.tolist(), len(codes)]
    for number in range(1, len(bounds) - 2):
        start, end = bounds[number], bounds[number + 1]
        before = codes[start - 1]
        if codes[start] == _TEMPLATE and before == codes[end] and not _WORD.search(text, start, end):
            codes[start:end] = before
