"""A request as the server sees it: its tokens, and from where on they are read. Knows no detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.card import Format, Stage
from probes.errors import TelltaleError
from probes.fit.rows.example import Example

__all__ = ["RenderError", "Rendered", "prompt_tokens", "render"]


class RenderError(TelltaleError, ValueError):
    """An example has nothing that could be read at a stage."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One request.

    Attributes:
        tokens: ids, in order.
        first: position of the first one that is read; all behind it are.
    """

    tokens: tuple[int, ...]
    first: int

    def positions(self, skip_first: int) -> npt.NDArray[np.int64]:
        """(T,) positions of the read sequence; empty if the request is too short.

        Args:
            skip_first: leading positions that are never scored.
        """
        return np.arange(min(max(self.first, skip_first), len(self.tokens)), len(self.tokens))


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


def render(tokenizer: Any, example: Example, *, text_format: Format, stage: Stage) -> Rendered:
    """What the server reads of the request at a stage.

    ``prompt``: the prompt alone. ``stream`` and ``response``: the prompt and then the reply, read from the reply's
    first token on; of a raw prompt everything is read, since it may be a reply that came back. The token that ends a
    reply is never fed back to the model, so nobody reads it.

    Args:
        tokenizer: transformers'.
        example: with a response, unless the stage is ``prompt`` or the format raw.
        text_format: how its text reaches the model.
        stage: when it is judged.
    Raises:
        RenderError: there is no response to read, or messages of the assistant end the prompt.
    """
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
