"""How the model is read at a SAE's tap: which model it must be, which texts, and what is read of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from probes.cachedir import user_cache_dir
from probes.card import Format, Stage
from probes.fit.reading.activations import ActivationReader
from probes.fit.reading.rendered import Rendered, render
from probes.fit.rows.example import Example, data_digest
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext
from probes.modelref import read_model_ref
from probes.sae.describe.corpus import Corpus, CorpusError, cut_documents, whole_requests
from probes.sae.file import SaeFile
from probes.sae.train.config import SaeConfig
from probes.sae.train.corpus import build_corpus

__all__ = ["open_sae_reader", "read_requests", "text_corpus", "training_corpus"]


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


def text_corpus(model_dir: Path, texts: Sequence[Example], *, max_tokens: int, piece_tokens: int = 256) -> Corpus:
    """A corpus of any texts: messages and replies through the chat template, others as they are.

    Args:
        model_dir: for the tokenizer.
        texts: at least four.
        max_tokens: no text is begun once there are as many.
        piece_tokens: longer texts are cut into pieces of so many.
    Raises:
        probes.sae.describe.corpus.CorpusError: they are too few or too short.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    documents = (_tokens(tokenizer, text) for text in texts)
    return cut_documents(documents, piece_tokens=piece_tokens, max_tokens=max_tokens, digest=data_digest(texts))


def training_corpus(model_dir: Path, config: SaeConfig, wheels: WheelStore, *, max_tokens: int) -> Corpus:
    """The texts that a SAE was trained on, in the order of its training.

    Args:
        model_dir: for the tokenizer.
        config: of the training.
        wheels: packages with texts.
        max_tokens: no text is begun once there are as many.
    Raises:
        probes.sae.describe.corpus.CorpusError: it was trained on collected activations, or on too little text.
        probes.errors.TelltaleError: a set cannot be read.
    """
    if config.corpus is None:
        raise CorpusError(
            f"{config.name} was trained on activations that were collected: their texts are not known. Give texts "
            "(.jsonl)."
        )
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    built = build_corpus(config.corpus, SourceContext(wheels=wheels, folder=Path(), seed=config.seed), tokenizer)
    return whole_requests(built.train, max_tokens=max_tokens, digest=built.digest)


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


def _tokens(tokenizer: Any, text: Example) -> tuple[int, ...]:
    chat = bool(text.turns or text.response)
    stage = Stage.RESPONSE if text.response else Stage.PROMPT
    return render(tokenizer, text, text_format=Format.CHAT if chat else Format.RAW, stage=stage).tokens
