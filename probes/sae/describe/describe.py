"""Describe every latent of a SAE: one pass over a corpus and labelled sets, then statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array
from transformers import AutoTokenizer

from probes.card import Format
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.example import Example
from probes.fit.training.lens import read_unembedding
from probes.sae.describe.codes import SINK_FACTOR, Codes, read_codes
from probes.sae.describe.contexts import pick_contexts
from probes.sae.describe.corpus import Corpus, cut_windows
from probes.sae.describe.description import (
    Description,
    EnrichedIn,
    LabelScore,
    LatentDescription,
    MarkedContext,
    Token,
)
from probes.sae.describe.detection import LabelTest, run_label_test
from probes.sae.describe.enrichment import Enrichment, enrich
from probes.sae.describe.labeller import Labeller
from probes.sae.describe.output_tokens import OutputTokens, output_tokens
from probes.sae.describe.random_directions import draw_random_directions
from probes.sae.describe.reading import open_sae_reader, read_requests
from probes.sae.describe.token_label import LabelMaker, TokenLabel
from probes.sae.file import SaeFile
from probes.sae.sae import Sae

__all__ = ["Describing", "describe"]

_SAMPLE_PIECES = 64
"""Pieces by which the random directions' thresholds are set."""
_OUTPUT_TOKENS = 10
_GREATEST_Q = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Describing:
    """How a SAE is described.

    Attributes:
        model_dir: folder of its model, in transformers' layout.
        model_id: what people call it.
        corpus_name: of the texts.
        progress: told what is being done.
        created_by: version that writes it.
        window: tokens of a window, see ``token_label``.
        per_quantile: contexts shown of each fifth of a latent's activity, the lowest first.
        text_format: how the labelled sets reach the model.
        seed: of every draw.
        labeller: another model that names latents; None: nobody is asked.
        named: how many latents it is asked about, those whose label scores best.
    """

    model_dir: Path
    model_id: str
    corpus_name: str
    progress: Callable[[str], None]
    created_by: str = ""
    window: int = 32
    per_quantile: tuple[int, ...] = (2, 2, 2, 2, 6)
    text_format: Format = Format.CHAT
    seed: int = 0
    labeller: Labeller | None = field(default=None)
    named: int = 50


def describe(file: SaeFile, corpus: Corpus, labelled: Mapping[str, Sequence[Example]], how: Describing) -> Description:
    """Read the corpus and the sets once, and say what can be said of each latent.

    Args:
        file: of the SAE.
        corpus: see ``probes.sae.describe.reading`` for two ways to one.
        labelled: sets with labels 0 and 1 by name; may be empty.
        how: all else.
    Raises:
        probes.artifact.ArtifactError: the SAE belongs to another model.
        probes.sae.describe.codes.CodesError: its codes are not sparse, or not finite.
        probes.sae.describe.labeller.LabellerError: the labeller did not answer.
    """
    reader = open_sae_reader(file, how.model_dir, model_id=how.model_id, progress=how.progress)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(how.model_dir), local_files_only=True)
    sae, skip_first = file.sae(), file.card.skip_first
    sample = _sample(sae, reader, corpus, skip_first)
    control = draw_random_directions(sae.tap, sample.rows, (sae.encode(sample.rows) > 0).mean(axis=0), seed=how.seed)
    codes, random_codes = read_codes(
        [sae, control], reader, corpus.pieces, skip_first=skip_first, label="corpus", max_norm=sample.max_norm
    )
    sets = {
        name: _enrichment(sae, reader, rows, text_format=how.text_format, skip_first=skip_first, name=name)
        for name, rows in labelled.items()
    }
    how.progress(f"making labels of {codes.num_rows} tokens for {sae.width} latents")
    windows = cut_windows(codes.offsets, corpus.halves(how.seed), width=how.window)
    maker = LabelMaker(codes.tokens, windows)
    turned = codes.by_latent()
    test = run_label_test(maker, turned, random_codes.by_latent(), seed=how.seed)
    unembedding = read_unembedding(how.model_dir).rows
    spoken = output_tokens(sae.decoder, unembedding, count=_OUTPUT_TOKENS)
    writer = _Writer(codes, turned, sets, tokenizer, how)
    latents = [writer.latent(i, test.labels[i], tokens) for i, tokens in enumerate(spoken)]
    return Description(
        sae=file.card.name,
        tensors_digest=file.card.tensors_digest,
        model=file.card.model.id,
        tap=str(sae.tap),
        width=sae.width,
        corpus=how.corpus_name,
        corpus_digest=corpus.digest,
        documents=len(np.unique(corpus.document)),
        rows=codes.num_rows,
        window=how.window,
        skip_first=skip_first,
        max_norm=sample.max_norm,
        labelled_sets=tuple(labelled),
        controls=test.figures,
        latents=tuple(_named(latents, test, how)),
        created_by=how.created_by,
    )


class _Writer:
    """Puts together what is known of a latent."""

    def __init__(
        self, codes: Codes, turned: csc_array, sets: Mapping[str, Enrichment], tokenizer: Any, how: Describing
    ) -> None:
        self._codes = codes
        self._turned = turned
        self._request = codes.request_of_row()
        self._sets = sets
        self._tokenizer = tokenizer
        self._per_quantile = how.per_quantile
        self._generator = np.random.default_rng(how.seed)
        self._texts: dict[int, str] = {}

    def latent(self, number: int, label: TokenLabel, spoken: OutputTokens) -> LatentDescription:
        inside = slice(self._turned.indptr[number], self._turned.indptr[number + 1])
        rows, values = self._turned.indices[inside].astype(np.int64), self._turned.data[inside]
        contexts = pick_contexts(
            self._codes, rows, values, self._request, per_quantile=self._per_quantile, generator=self._generator
        )
        return LatentDescription(
            latent=number,
            density=len(rows) / self._codes.num_rows,
            mean_activity=float(values.mean()) if len(values) else 0.0,
            largest_activity=float(values.max()) if len(values) else 0.0,
            label=self._all(share.token for share in label.tokens),
            score=None
            if label.score is None
            else LabelScore(
                made_on=label.score.made_on,
                held_out=label.score.held_out,
                active_windows=label.score.active_windows,
            ),
            by_pmi=tuple(
                Token(text=self._text(share.token), pmi=round(share.pmi, 3), active=share.active, rows=share.rows)
                for share in label.by_pmi
            ),
            promoted=self._all(spoken.promoted),
            suppressed=self._all(spoken.suppressed),
            enriched=tuple(self._enriched(number)),
            contexts=tuple(
                MarkedContext(
                    quantile=context.quantile,
                    tokens=self._all(context.tokens),
                    activity=context.activity,
                    marked=context.marked,
                )
                for context in contexts
            ),
        )

    def _enriched(self, number: int) -> list[EnrichedIn]:
        found = [
            EnrichedIn(
                set=name,
                odds_ratio=float(result.odds_ratio[number]),
                p=float(result.p[number]),
                q=float(result.q[number]),
                positives=int(result.positives[number]),
                negatives=int(result.negatives[number]),
            )
            for name, result in self._sets.items()
            if result.q[number] <= _GREATEST_Q
        ]
        return sorted(found, key=lambda each: (each.q, -each.odds_ratio, each.set))

    def _all(self, tokens: Iterator[int] | Sequence[int]) -> tuple[str, ...]:
        return tuple(self._text(token) for token in tokens)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts[token]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Rows from all over the corpus, and the norm above which a row is a sink; these are left out."""

    rows: npt.NDArray[np.float32]
    max_norm: float


def _sample(sae: Sae, reader: ActivationReader, corpus: Corpus, skip_first: int) -> _Sample:
    step = max(len(corpus.pieces) // _SAMPLE_PIECES, 1)
    pieces = corpus.pieces[::step][:_SAMPLE_PIECES]
    parts = [
        found[sae.tap][pieces[number].positions(skip_first)].copy()
        for number, found in reader.sweep(pieces, [sae.tap], label="sample")
    ]
    rows = np.concatenate(parts)
    norms = np.linalg.norm(rows, axis=1)
    max_norm = SINK_FACTOR * float(np.median(norms))
    return _Sample(rows[norms <= max_norm], max_norm)


def _enrichment(
    sae: Sae, reader: ActivationReader, rows: Sequence[Example], *, text_format: Format, skip_first: int, name: str
) -> Enrichment:
    requests = read_requests(reader, rows, text_format)
    codes = read_codes([sae], reader, requests, skip_first=skip_first, label=name)[0]
    return enrich(codes.maxima() > 0, np.array([row.label for row in rows], dtype=np.int64))


def _named(latents: Sequence[LatentDescription], test: LabelTest, how: Describing) -> list[LatentDescription]:
    if how.labeller is None:
        return list(latents)
    named = list(latents)
    for done, number in enumerate(test.best[: how.named], 1):
        named[number] = latents[number].model_copy(update={"named": how.labeller.name(latents[number])})
        if done % 10 == 0:
            how.progress(f"labeller: {done} latents named")
    return named
