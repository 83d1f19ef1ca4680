"""Marks around the texts of a conversation: characters that occur nowhere else in it. Knows no template."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from monitor.types import Role

Message = Mapping[str, Any]
"""A message as the template gets it: vLLM's ``ConversationMessage``."""

_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Two planes of characters that mean nothing to anybody, and that no template, JSON or strip() changes."""
_PRIVATE_CHARACTER = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_HARMLESS = re.compile(r"[A-Za-z0-9_-]{0,64}")
"""One identifier: too little to say anything. Templates compare such values, so they stay as they are."""
_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
    "ipython": Role.TOOL,
}
_SETTINGS = {"tools": Role.SYSTEM, "documents": Role.TOOL}
_OPERATORS = ("chat_template", "return_dict", "tokenize")
"""Settings that are the server's and not the request's."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks of one conversation.

    Attributes:
        begin, end: mark -> code of the role whose text begins or ends there.
        trailing: stands at the beginning of each text of the trailing segment.
    """

    begin: Mapping[str, int]
    end: Mapping[str, int]
    trailing: str

    @classmethod
    def draw(cls, text: str) -> Self:
        """Draw marks by lot, so that nobody can write them in advance; none of them occurs in ``text``."""
        taken = set(text)
        drawn: list[str] = []
        while len(drawn) < 2 * len(Role) + 1:
            mark = chr(secrets.choice(secrets.choice(_PRIVATE)))
            if mark not in taken:
                taken.add(mark)
                drawn.append(mark)
        roles = tuple(Role)
        return cls(
            begin={mark: role.code for mark, role in zip(drawn[: len(roles)], roles, strict=True)},
            end={mark: role.code for mark, role in zip(drawn[len(roles) : -1], roles, strict=True)},
            trailing=drawn[-1],
        )

    def around(self, text: str, role: Role, *, trailing: bool, inside: bool) -> str:
        """Mark a text; ``inside``: within the whitespace at its ends, which the template may strip."""
        body = text.strip() if inside else text
        if not body:
            return text
        at = text.index(body)
        begin = next(mark for mark, code in self.begin.items() if code == role.code)
        end = next(mark for mark, code in self.end.items() if code == role.code)
        marked = f"{begin}{self.trailing if trailing else ''}{body}{end}"
        return text[:at] + marked + text[at + len(body) :]

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Place and kind of each mark, in order."""
        for match in _PRIVATE_CHARACTER.finditer(text):
            mark = match.group()
            if mark == self.trailing or mark in self.begin or mark in self.end:
                yield match.start(), mark

    def remove(self, text: str) -> str:
        """The text without marks."""
        edges = [at for at, _ in self.find(text)]
        starts = [0, *(at + 1 for at in edges)]
        return "".join(text[start:end] for start, end in zip(starts, [*edges, len(text)], strict=True))


@dataclass(frozen=True, slots=True)
class Marked:
    """A marked conversation.

    Attributes:
        messages, settings: with marks.
        complete: whether every text in them that a client can write was marked.
    """

    messages: list[Message]
    settings: dict[str, Any]
    complete: bool


def role_of(message: Message) -> Role:
    """Whose the content of a message is; a user's where nobody can tell."""
    return _ROLES.get(message.get("role", ""), Role.USER)


def trailing_from(messages: Sequence[Message], settings: Mapping[str, Any]) -> int:
    """Number of the message with which the trailing assistant segment begins; ``len(messages)`` if with none.

    The last messages of the assistant belong to it. Without a generation prompt the model goes on with the last
    message, whoever wrote it.
    """
    first = len(messages)
    while first and messages[first - 1].get("role") == "assistant":
        first -= 1
    asks_reply = settings.get("add_generation_prompt") and not settings.get("continue_final_message")
    return first if asks_reply or first < len(messages) else max(first - 1, 0)


def marked_messages(
    messages: Sequence[Message], settings: Mapping[str, Any], marks: Marks, *, everything: bool, inside: bool
) -> Marked:
    """Mark a conversation.

    Args:
        messages: as the template gets them.
        settings: its other variables.
        marks: drawn for this conversation.
        everything: mark identifiers, names, tools and settings too, and not only what messages say.
        inside: see ``Marks.around``.
    """
    marker = _Marker(marks, everything=everything, inside=inside)
    first = trailing_from(messages, settings)
    marked = [marker.message(message, trailing=number >= first) for number, message in enumerate(messages)]
    others = {
        key: value if key in _OPERATORS else marker.other(value, _SETTINGS.get(key, Role.USER), trailing=False)
        for key, value in settings.items()
    }
    return Marked(marked, others, marker.complete)


class _Marker:
    def __init__(self, marks: Marks, *, everything: bool, inside: bool) -> None:
        self._marks = marks
        self._everything = everything
        self._inside = inside
        self.complete = True

    def message(self, message: Message, *, trailing: bool) -> Message:
        role = role_of(message)
        marked: dict[str, Any] = {}
        for key, value in message.items():
            match key:
                case "role":
                    marked[key] = value
                    self.complete &= isinstance(value, str) and _HARMLESS.fullmatch(value) is not None
                case "content":
                    marked[key] = self._content(value, role, trailing=trailing)
                case "reasoning" | "reasoning_content":
                    marked[key] = self._all(value, Role.REASONING, trailing=trailing)
                case "tool_calls" if isinstance(value, list):
                    marked[key] = [self._tool_call(call, trailing=trailing) for call in value]
                case _:
                    marked[key] = self.other(value, role, trailing=trailing)
        return marked

    def other(self, value: Any, role: Role, *, trailing: bool) -> Any:
        """What is not said in a message: identifiers and single words stay as they are."""
        match value:
            case str():
                if _HARMLESS.fullmatch(value):
                    return value
                if not self._everything:
                    self.complete = False
                    return value
                return self._marks.around(value, role, trailing=trailing, inside=self._inside)
            case list() | tuple():
                return [self.other(item, role, trailing=trailing) for item in value]
            case dict():
                # A key is what a template looks a value up by.
                self.complete &= all(_HARMLESS.fullmatch(str(key)) for key in value)
                return {key: self.other(item, role, trailing=trailing) for key, item in value.items()}
            case _:
                return value

    def _content(self, value: Any, role: Role, *, trailing: bool) -> Any:
        if not isinstance(value, list):
            return self._all(value, role, trailing=trailing)
        return [
            {
                key: self._all(item, role, trailing=trailing)
                if key == "text"
                else self.other(item, role, trailing=trailing)
                for key, item in part.items()
            }
            if isinstance(part, dict)
            else self._all(part, role, trailing=trailing)
            for part in value
        ]

    def _tool_call(self, call: Any, *, trailing: bool) -> Any:
        if not isinstance(call, dict):
            return self._all(call, Role.ASSISTANT, trailing=trailing)
        return {
            key: {name: self._all(item, Role.ASSISTANT, trailing=trailing) for name, item in value.items()}
            if key == "function" and isinstance(value, dict)
            else self.other(value, Role.ASSISTANT, trailing=trailing)
            for key, value in call.items()
        }

    def _all(self, value: Any, role: Role, *, trailing: bool) -> Any:
        """What is said: every text in it, keys too."""
        match value:
            case str():
                return self._marks.around(value, role, trailing=trailing, inside=self._inside)
            case list() | tuple():
                return [self._all(item, role, trailing=trailing) for item in value]
            case dict():
                return {
                    self._all(key, role, trailing=trailing): self._all(item, role, trailing=trailing)
                    for key, item in value.items()
                }
            case _:
                return value
