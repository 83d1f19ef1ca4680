"""Makes detectors that need no labels: novelty, of ordinary requests, and lenses, of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact
from probes.card import Format, Stage
from probes.fit.rows.example import Example, data_digest
from probes.fit.training.lens import lens_tensors, token_ids
from probes.fit.training.making import Making
from probes.fit.training.novelty import NoveltyError, fit_novelty
from probes.taps import Tap

__all__ = ["make_lens", "make_novelty"]

_NORM_TEST_ROWS = 32
_MOST_ROWS = 200_000
"""Rows that are kept: 460 MB at 576 dimensions."""


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
    reader = making.reader()
    skip_first = max(reader.sink_positions(requests[:_NORM_TEST_ROWS], text_format) for text_format in text_formats)
    tap = Tap(making.layer)
    rendered = {each: reader.render(requests, text_format=each, stage=Stage.PROMPT) for each in text_formats}
    count = sum(len(request.positions(skip_first)) for some in rendered.values() for request in some)
    if count > _MOST_ROWS:
        raise NoveltyError(
            f"the requests have {count} tokens, {_MOST_ROWS} are allowed: that many say all there is to say. Give "
            "fewer requests."
        )
    parts: list[npt.NDArray[np.float32]] = [np.empty((0, reader.model.d_model), np.float32)]
    for text_format, some in rendered.items():
        for number, found in reader.sweep(some, [tap], label=f"ordinary requests ({text_format.value})"):
            parts.append(found[tap][some[number].positions(skip_first)].copy())
    rows = np.concatenate(parts)
    training = {"data_digest": data_digest(requests), "requests": len(requests), "rows": len(rows)}
    tensors = fit_novelty(rows, components=components)
    return making.finish(reader, "novelty", tensors, skip_first=skip_first, training=training)


def make_lens(making: Making, *, tokens: Sequence[str], contrast: Sequence[str]) -> Artifact:
    """A detector of what the model is about to say: see ``probes.detectors.lens``.

    Args:
        making: for what.
        tokens: texts of single tokens.
        contrast: others, which they are weighed against.
    Raises:
        LensError: a text is no single token, or the model has no such lens.
    """
    reader = making.reader()
    sets = [token_ids(making.model_dir, texts) for texts in (tokens, contrast)]
    tensors = lens_tensors(making.model_dir, *sets)
    probe = Example(text="The quick brown fox jumps over the lazy dog.", label=0, source="lens", group="lens")
    skip_first = max(reader.sink_positions([probe], text_format) for text_format in Format)
    training = {"tokens": list(tokens), "contrast": list(contrast), "ids": sets}
    return making.finish(reader, "lens", tensors, skip_first=skip_first, training=training)
