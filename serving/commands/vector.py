"""``telltale vector``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import serving
from probes.card import Format
from probes.errors import TelltaleError, did_you_mean
from probes.steering.artifact import Safety, SteerArtifact
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say

PAIRS = {".jsonl", ".json"}
Word = TypeVar("Word", bound=StrEnum)


class VectorError(TelltaleError, ValueError):
    """The command cannot tell what to make a direction of."""


def vector(
    source: Path,
    *,
    model: str | None,
    layer: int,
    name: str,
    more_is: str,
    description: str,
    method: str,
    text_format: str,
    read: str,
    tensor: str | None,
    out: Path,
) -> None:
    """Make a steering direction of contrast pairs (.jsonl), a control vector (.gguf) or a tensor (.safetensors).

    Raises:
        probes.errors.TelltaleError: the source or the model is not usable.
    """
    from probes.fit.steer.pairs import VectorMethod
    from probes.fit.steer.vector import (
        Subject,
        import_vector,
        read_gguf_direction,
        read_safetensors_direction,
        vector_from_pairs,
    )

    chosen = model or DEFAULT_MODEL
    folder = embedded_folder(chosen) or Path(chosen)
    about = description or f"made of {source.name} by telltale vector"
    safety, found_by = _option("--more-is", more_is, Safety), _option("--method", method, VectorMethod)
    fmt = _option("--format", text_format, Format)
    subject = Subject(folder, chosen, layer, name, about, safety, serving.__version__)
    if source.suffix in PAIRS:
        made = vector_from_pairs(subject, source, method=found_by, text_format=fmt, read=read, out=out, progress=say)
    elif source.suffix == ".gguf":
        direction = read_gguf_direction(source, layer)
        made = import_vector(subject, direction, source={"gguf": source.name}, out=out, progress=say)
    elif source.suffix == ".safetensors":
        direction = read_safetensors_direction(source, tensor)
        kept = {"safetensors": source.name, "tensor": tensor}
        made = import_vector(subject, direction, source=kept, out=out, progress=say)
    else:
        raise VectorError(
            f"{source}: what a direction is made of ends in .jsonl (contrast pairs), .gguf (a control vector) or "
            ".safetensors (a tensor)."
        )
    _show(made)


def _option(option: str, value: str, words: type[Word]) -> Word:
    known = [word.value for word in words]
    if value not in known:
        raise VectorError(f"{option} is {value!r}. {did_you_mean(value, known)}")
    return words(value)


def _show(made: SteerArtifact) -> None:
    card = made.card
    say(
        f"wrote {made.path}: {card.tap}, median norm {card.median_norm:.4g}; {card.corpus_rows} ordinary rows have "
        f"{card.mean:.3g} along it in the mean, one in a hundred more than {card.ceiling:.3g}"
    )
