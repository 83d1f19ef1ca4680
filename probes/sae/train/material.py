"""What one autoencoder is trained on and measured on: rows, and whole requests that were held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from probes.card import ModelRef
from probes.errors import TelltaleError
from probes.fit.reading.activation_store import ActivationStore, StoredRequest
from probes.fit.reading.rendered import Rendered
from probes.fit.sources import SourceContext
from probes.sae.train.corpus import CorpusSettings, build_corpus
from probes.sae.train.reading import RowReader
from probes.sae.train.rows import RowPool
from probes.taps import Tap

__all__ = ["Material", "MaterialError", "collected_material", "corpus_material"]

_HELD_OUT = 0.05
_OUTLIER = 10.0
"""Times the median norm: rows beyond are sinks, wherever they stand; one of them outweighs a batch of others."""
_BUCKETS = 1 << 32


class MaterialError(TelltaleError, ValueError):
    """A folder of activations is of no use for training an autoencoder."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Material:
    """Rows are without sinks: neither those at leading positions nor rows with a sink's norm elsewhere.

    Attributes:
        train: rows.
        held_out_rows: of the requests below.
        held_out: requests, for what is measured on whole ones.
        skip_first: leading positions that are sinks.
        max_norm: rows above it are sinks.
        corpus: what it is, for people.
        digest: of the texts, or of the folder's input.
        record: for the card: tokens by source.
    """

    train: RowPool
    held_out_rows: RowPool
    held_out: tuple[Rendered, ...]
    skip_first: int
    max_norm: float
    corpus: str
    digest: str
    record: Mapping[str, Any]


def corpus_material(
    settings: CorpusSettings,
    context: SourceContext,
    *,
    model_dir: Path,
    model: ModelRef,
    tap: Tap,
    cache_dir: Path,
    advance: Callable[[str, int, int], None],
) -> Material:
    """Texts, read with transformers up to the tap's layer.

    Args:
        settings: which texts.
        context: packages and the seed.
        model_dir: folder in transformers' layout.
        model: which model that is.
        tap: what is read.
        cache_dir: where the rows are kept between runs, 2 * d_model bytes a token.
        advance: told what is read, how many requests are done, and of how many.
    Raises:
        TelltaleError: of the corpus or of the reading.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    corpus = build_corpus(settings, context, tokenizer)
    reader = RowReader(model_dir, model=model, tap=tap)
    skip_first = reader.sinks(corpus.train)

    def read(label: str, requests: tuple[Rendered, ...]) -> RowPool:
        return reader.read(
            requests,
            skip_first=skip_first,
            folder=cache_dir / "sae-rows",
            progress=lambda done, total: advance(label, done, total),
        )

    return _without_sinks(
        read("reading training texts", corpus.train),
        read("reading held-out texts", corpus.held_out),
        held_out=corpus.held_out,
        skip_first=skip_first,
        corpus=", ".join(f"{name} ({count:,} tokens)" for name, count in corpus.tokens.items()),
        digest=corpus.digest,
        record={"tokens": dict(corpus.tokens), "read_with": "transformers, float32"},
    )


def collected_material(folder: Path, *, model: ModelRef, tap: Tap) -> Material:
    """Activations that the serving engine computed: a folder of ``telltale collect``. One request in 20 is held out.

    Args:
        folder: collected with all positions, or those of the prompt.
        model: that they must be of.
        tap: what was read.
    Raises:
        MaterialError: positions are missing, or there are too few requests.
        probes.fit.reading.activation_store.StoreError: the folder is damaged or of another model, or lacks the tap.
    """
    store = ActivationStore.open(folder, model=model)
    train: list[npt.NDArray[np.int64]] = []
    held: list[npt.NDArray[np.int64]] = []
    arrays: list[npt.NDArray[np.floating]] = []
    requests: list[Rendered] = []
    number = 0
    for shard in store.shards:
        sides: tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]] = ([], [])
        start = 0
        for _ in range(shard.record.requests):
            request = store[number]
            tokens = _whole(request, folder)
            rows = start + np.flatnonzero(~request.is_sink)
            out = _is_held_out(store.manifest.settings.input_digest, number)
            sides[out].append(rows)
            if out:
                requests.append(Rendered(tokens, 0))
            start += len(tokens)
            number += 1
        arrays.append(shard.tensors[str(tap)] if str(tap) in shard.tensors else store[number - 1].at(tap))
        for side, parts in zip((train, held), sides, strict=True):
            side.append(np.concatenate([*parts, np.empty(0, dtype=np.int64)]))
    if not requests:
        raise MaterialError(f"{folder}: none of {number} requests was held out to measure on. Collect more of them.")
    return _without_sinks(
        RowPool(arrays, kept=train),
        RowPool(arrays, kept=held),
        held_out=tuple(requests),
        skip_first=store.manifest.skip_first,
        corpus=f"{number:,} requests collected by the serving engine",
        digest=store.manifest.settings.input_digest,
        record={"requests": number, "read_with": "telltale collect"},
    )


def _without_sinks(
    train: RowPool,
    held_out_rows: RowPool,
    *,
    held_out: tuple[Rendered, ...],
    skip_first: int,
    corpus: str,
    digest: str,
    record: Mapping[str, Any],
) -> Material:
    norms = train.norms()
    max_norm = _OUTLIER * float(np.median(norms))
    ordinary = norms <= max_norm
    return Material(
        train=train.only(ordinary),
        held_out_rows=held_out_rows.only(held_out_rows.norms() <= max_norm),
        held_out=held_out,
        skip_first=skip_first,
        max_norm=max_norm,
        corpus=corpus,
        digest=digest,
        record={**record, "max_norm": max_norm, "rows_above_max_norm": int(np.sum(~ordinary))},
    )


def _whole(request: StoredRequest, folder: Path) -> tuple[int, ...]:
    if not np.array_equal(request.positions, np.arange(len(request.positions))):
        raise MaterialError(
            f"{folder}: line {request.record.line} was kept from position {int(request.positions[0])} on. An "
            "autoencoder is trained on every token: collect with --positions all, or prompt."
        )
    return tuple(request.tokens.tolist())


def _is_held_out(salt: str, number: int) -> bool:
    digest = hashlib.sha256(f"{salt}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT * _BUCKETS
