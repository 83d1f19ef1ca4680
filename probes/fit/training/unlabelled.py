"""Makes detectors that need no labels: novelty, of ordinary requests, and lenses, of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.cachedir import user_cache_dir
from probes.card import Card, Format, ModelRef, Stage
from probes.detectors import load_detector
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.example import Example, data_digest
from probes.fit.training.canary import make_canary
from probes.fit.training.lens import lens_tensors, token_ids
from probes.fit.training.novelty import NoveltyError, fit_novelty
from probes.modelref import read_model_ref
from probes.taps import Tap

__all__ = ["Making", "make_lens", "make_novelty"]

_SERVED_DTYPE = "float32"
_NORM_TEST_ROWS = 32
_MOST_ROWS = 200_000
"""Rows that are kept: 460 MB at 576 dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What a detector is made for.

    Attributes:
        model_dir: folder of the model in transformers' layout.
        model_id: what people call it.
        layer: after which it reads.
        name, description: for the card.
        out: folder for the artifact.
        created_by: version that makes it.
        progress: told what is being done.
        cache_dir: for digests of the model's files; the user's own if None.
    """

    model_dir: Path
    model_id: str
    layer: int
    name: str
    description: str
    out: Path
    created_by: str
    progress: Callable[[str], None]
    cache_dir: Path | None = None


def make_novelty(
    making: Making, requests: Sequence[Example], *, text_formats: Sequence[Format], components: int
) -> Artifact:
    """A detector of what is unlike these requests: see ``probes.detectors.novelty``.

    Args:
        making: for what.
        requests: ordinary ones, as those that will be served.
        text_formats: how they reach the model.
        components: principal components that are told apart.
    Raises:
        NoveltyError: too few rows.
        TelltaleError: the model cannot be read.
    """
    model, reader = _open(making)
    skip_first = max(reader.sink_positions(requests[:_NORM_TEST_ROWS], text_format) for text_format in text_formats)
    tap = Tap(making.layer)
    rendered = {each: reader.render(requests, text_format=each, stage=Stage.PROMPT) for each in text_formats}
    count = sum(len(request.positions(skip_first)) for some in rendered.values() for request in some)
    if count > _MOST_ROWS:
        raise NoveltyError(
            f"the requests have {count} tokens, {_MOST_ROWS} are allowed: that many say all there is to say. Give "
            "fewer requests."
        )
    parts: list[npt.NDArray[np.float32]] = [np.empty((0, model.d_model), np.float32)]
    for text_format, some in rendered.items():
        for number, found in reader.sweep(some, [tap], label=f"ordinary requests ({text_format.value})"):
            parts.append(found[tap][some[number].positions(skip_first)].copy())
    rows = np.concatenate(parts)
    training = {"data_digest": data_digest(requests), "requests": len(requests), "rows": len(rows)}
    return _finish(
        making, reader, "novelty", fit_novelty(rows, components=components), skip_first=skip_first, training=training
    )


def make_lens(making: Making, *, tokens: Sequence[str], contrast: Sequence[str]) -> Artifact:
    """A detector of what the model is about to say: see ``probes.detectors.lens``.

    Args:
        making: for what.
        tokens: texts of single tokens.
        contrast: others, which they are weighed against.
    Raises:
        LensError: a text is no single token, or the model has no such lens.
    """
    _, reader = _open(making)
    sets = [token_ids(making.model_dir, texts) for texts in (tokens, contrast)]
    tensors = lens_tensors(making.model_dir, *sets)
    probe = Example(text="The quick brown fox jumps over the lazy dog.", label=0, source="lens", group="lens")
    skip_first = max(reader.sink_positions([probe], text_format) for text_format in Format)
    training = {"tokens": list(tokens), "contrast": list(contrast), "ids": sets}
    return _finish(making, reader, "lens", tensors, skip_first=skip_first, training=training)


def _open(making: Making) -> tuple[ModelRef, ActivationReader]:
    cache = making.cache_dir or user_cache_dir()
    model = read_model_ref(making.model_dir, model_id=making.model_id, dtype=_SERVED_DTYPE, cache_dir=cache)
    reader = ActivationReader(
        making.model_dir, model=model, layers=[making.layer], cache_dir=cache, progress=making.progress
    )
    return model, reader


def _finish(
    making: Making,
    reader: ActivationReader,
    kind: str,
    tensors: Mapping[str, npt.NDArray[np.generic]],
    *,
    skip_first: int,
    training: dict[str, Any],
) -> Artifact:
    card = Card(
        name=making.name,
        kind=kind,
        description=making.description,
        model=reader.model,
        taps=(str(Tap(making.layer)),),
        formats=tuple(Format),
        skip_first=skip_first,
        tensors_digest="0" * 64,
        training=training,
        created_by=making.created_by,
    )
    path = making.out / f"{making.name}.safetensors"
    detector = load_detector(Artifact(path, card, tensors))
    canary = make_canary(detector, reader, skip_first=skip_first, dtype=reader.model.dtype)
    return Artifact(path, card.model_copy(update={"canary": canary}), tensors).save(path)
