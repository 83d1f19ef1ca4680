"""A request as the server sees it: its tokens, and from where on they are read. Knows no detector."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.card import Format, Stage
from probes.errors import TelltaleError
from probes.fit.rows.example import Example
from probes.speaker import Speaker

__all__ = ["RenderError", "Rendered", "prompt_tokens", "render"]


_BEGIN, _END = "\ue000", "\ue001"
"""Of Unicode's private plane: marks around the texts of messages."""


class RenderError(TelltaleError, ValueError):
    """An example has nothing that could be read at a stage."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One request.

    Attributes:
        tokens: ids, in order.
        first: position of the first one that is read; all behind it are, but for those that ``only`` leaves out.
        only: positions that are read, rising; None: all.
    """

    tokens: tuple[int, ...]
    first: int
    only: tuple[int, ...] | None = None

    def positions(self, skip_first: int) -> npt.NDArray[np.int64]:
        """(T,) positions of the read sequence; empty if the request is too short.

        Args:
            skip_first: leading positions that are never scored.
        """
        start = min(max(self.first, skip_first), len(self.tokens))
        if self.only is None:
            return np.arange(start, len(self.tokens))
        return np.array([position for position in self.only if position >= start], dtype=np.int64)


def prompt_tokens(tokenizer: Any, example: Example, text_format: Format) -> list[int]:
    """The prompt: through the chat template with the generation prompt, or the text as it is.

    Args:
        tokenizer: transformers'.
        example: text, or turns.
        text_format: which of the two.
    """
    if text_format is Format.RAW:
        return list(tokenizer(example.text)["input_ids"])
    rendered = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def render(
    tokenizer: Any, example: Example, *, text_format: Format, stage: Stage, segments: Collection[Speaker] = ()
) -> Rendered:
    """What the server reads of the request at a stage.

    ``prompt``: the prompt alone. ``stream`` and ``response``: the prompt and then the reply, read from the reply's
    first token on; of a raw prompt everything is read, since it may be a reply that came back. The token that ends a
    reply is never fed back to the model, so nobody reads it. With ``segments`` only the prompt's tokens of these
    speakers are read.

    Args:
        tokenizer: transformers'.
        example: with a response, unless the stage is ``prompt`` or the format raw.
        text_format: how its text reaches the model.
        stage: when it is judged.
        segments: whose text is read; empty: everything. Of chats at the stage ``prompt``.
    Raises:
        RenderError: there is no response to read, messages of the assistant end the prompt, or nobody can tell who
            speaks.
    """
    if segments:
        if text_format is not Format.CHAT or stage is not Stage.PROMPT:
            raise RenderError(
                f"segments {[speaker.value for speaker in segments]} are read of chats at the stage 'prompt', not of "
                f"{text_format.value} at {stage.value!r}: nothing else says who speaks."
            )
        return _of_speakers(tokenizer, example, segments)
    prompt = prompt_tokens(tokenizer, example, text_format)
    if stage is Stage.PROMPT:
        return Rendered(tuple(prompt), 0)
    if text_format is Format.CHAT:
        if not example.response:
            raise RenderError(
                f"a row of {example.source!r} (group {example.group!r}) has no response; at the stage {stage.value!r} "
                "the reply is what is read. Give every row a 'response', or messages that end with the assistant's."
            )
        if example.turns and example.turns[-1][0] == "assistant":
            raise RenderError(
                f"a row of {example.source!r} (group {example.group!r}) has two messages of the assistant at its end. "
                "Make them one: a reply is one message."
            )
    reply = tokenizer(example.response, add_special_tokens=False)["input_ids"] if example.response else []
    return Rendered((*prompt, *reply), len(prompt) if text_format is Format.CHAT else 0)


def _of_speakers(tokenizer: Any, example: Example, segments: Collection[Speaker]) -> Rendered:
    """The prompt, of which the messages of some are read; a token that reaches into one of them is theirs."""
    text = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
    if not tokenizer.is_fast:
        raise RenderError(
            f"{type(tokenizer).__name__} does not say which characters a token is of, so nobody can tell who speaks. "
            "Use a model with a fast tokenizer."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    chosen = np.zeros(len(begins), dtype=np.bool_)
    for message, (first, last) in zip(example.messages, _spans(tokenizer, example, text), strict=True):
        if message["role"] in segments:
            chosen |= (begins < last) & (ends > first)
    return Rendered(tuple(encoded["input_ids"]), 0, tuple(np.flatnonzero(chosen).tolist()))


def _spans(tokenizer: Any, example: Example, text: str) -> list[tuple[int, int]]:
    """First character of each message's text in a prompt and the one behind its last.

    The messages are rendered once more with marks around their texts, as the server does: what a text says of itself is
    not believed. Templates may strip a text, so the marks are also tried inside of the whitespace.
    """
    for inside in (False, True):
        marked = [{**message, "content": _marked(message["content"], inside=inside)} for message in example.messages]
        rendered = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        pieces = rendered.replace(_END, _BEGIN).split(_BEGIN)
        if "".join(pieces) == text and len(pieces) == 2 * len(marked) + 1:
            ends = np.cumsum([len(piece) for piece in pieces])
            return [(int(ends[number - 1]), int(ends[number])) for number in range(1, len(pieces), 2)]
    raise RenderError(
        f"a row of {example.source!r} (group {example.group!r}): the chat template changes or leaves out what messages "
        "say, so nobody can tell who speaks. Write them as the template prints them."
    )


def _marked(content: str, *, inside: bool) -> str:
    inner = content.strip() if inside else content
    return content.replace(inner, f"{_BEGIN}{inner}{_END}", 1) if inner else f"{_BEGIN}{_END}"
