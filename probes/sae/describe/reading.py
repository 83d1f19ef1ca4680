"""How the model is read at a SAE's tap: which model it must be, and what is read of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probes.cachedir import user_cache_dir
from probes.card import Format, Stage
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.rendered import Rendered, render
from probes.fit.rows.example import Example
from probes.modelref import read_model_ref
from probes.sae.file import SaeFile

__all__ = ["document_tokens", "open_sae_reader", "read_requests"]


def open_sae_reader(
    file: SaeFile, model_dir: Path, *, model_id: str, progress: Callable[[str], None]
) -> ActivationReader:
    """A reader of the SAE's model at its tap.

    Args:
        file: of the SAE.
        model_dir: folder in transformers' layout.
        model_id: what people call the model.
        progress: told how far it is.
    Raises:
        probes.artifact.ArtifactError: the SAE belongs to another model.
    """
    model = read_model_ref(model_dir, model_id=model_id, dtype=file.card.model.dtype)
    file.require_model(model)
    return ActivationReader(
        model_dir,
        model=model,
        layers=[file.tap.layer],
        cache_dir=user_cache_dir(),
        progress=progress,
        site=file.tap.site,
    )


def document_tokens(tokenizer: Any, text: Example) -> tuple[int, ...]:
    """Tokens of a text of a corpus: messages and replies through the chat template, others as they are.

    Args:
        tokenizer: transformers'.
        text: of the corpus.
    """
    chat = bool(text.turns or text.response)
    stage = Stage.RESPONSE if text.response else Stage.PROMPT
    return render(tokenizer, text, text_format=Format.CHAT if chat else Format.RAW, stage=stage).tokens


def read_requests(reader: ActivationReader, rows: Sequence[Example], text_format: Format) -> list[Rendered]:
    """Requests as the server reads them: their replies where they have one, else their prompts.

    Args:
        reader: of the model.
        rows: of a labelled set.
        text_format: how their texts reach the model.
    """
    return [
        reader.render([row], text_format=text_format, stage=Stage.RESPONSE if row.response else Stage.PROMPT)[0]
        for row in rows
    ]
