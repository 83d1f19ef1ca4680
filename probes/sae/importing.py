"""Bring another library's sparse autoencoder into our form: checked against a model, measured, with a card. Offline."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probes.cachedir import user_cache_dir
from probes.card import ModelRef
from probes.errors import TelltaleError
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.ordinary import Ordinary, corpus_digest, read_ordinary
from probes.modelref import read_model_ref
from probes.sae.file import Precision, SaeCard, SaeFile, save_sae
from probes.sae.layouts import Found, Stated, read_layout
from probes.sae.rank import threshold_for_rank
from probes.sae.sae import Float32, Sae

__all__ = ["ImportedSaeError", "Importing", "Measured", "import_sae", "measure"]

_CHUNK = 1024
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
NOT_STATED = "not stated"


class ImportedSaeError(TelltaleError, ValueError):
    """A sparse autoencoder that does not belong to the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importing:
    """What to import, and for which model.

    Attributes:
        path: folder or file.
        model_dir: folder of the model in transformers' layout.
        model_id: what people call it.
        name: of the result: its card and its file.
        out: folder for it.
        stated: what the files may lack.
        layout: which library wrote the files; found out if None.
        precision: of the two matrices.
        licence, corpus, description: for the card, where the files do not say.
        force: take one that was trained on a model of another name, or that explains nothing here.
        created_by: version that writes it.
        progress: told what is being done.
    """

    path: Path
    model_dir: Path
    model_id: str
    name: str
    out: Path
    stated: Stated
    progress: Callable[[str], None]
    layout: str | None = None
    precision: Precision = Precision.FLOAT32
    licence: str = NOT_STATED
    corpus: str = NOT_STATED
    description: str = ""
    force: bool = False
    created_by: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What ordinary rows say of an autoencoder.

    Attributes:
        density: (width,) share of the rows at which each latent is active.
        l0: mean number of active latents of a row.
        fvu: share of the rows' variance around their mean that is not reconstructed; None for a transcoder.
    """

    density: Float32
    l0: float
    fvu: float | None

    def as_dict(self) -> dict[str, Any]:
        """For the card."""
        silent = float((self.density == 0).mean())
        told: dict[str, Any] = {"l0": round(self.l0, 2), "silent_share": round(silent, 4)}
        return told if self.fvu is None else {"fvu": round(self.fvu, 4), **told}


def import_sae(importing: Importing) -> SaeFile:
    """Read, check, measure and write.

    Raises:
        LayoutError: the files cannot be read, or hold a kind that cannot be served.
        ImportedSaeError: it belongs to another model, explains nothing of this one, or the name cannot be used.
        probes.errors.TelltaleError: the model cannot be read.
    """
    if _NAME.fullmatch(importing.name) is None:
        raise ImportedSaeError(
            f"the name is {importing.name!r}; it has lower-case letters, digits and '_', and begins with a letter."
        )
    found = read_layout(importing.path, importing.stated, kind=importing.layout)
    model = read_model_ref(importing.model_dir, model_id=importing.model_id, dtype="float32")
    _require_model(found, model, importing)
    tap = found.sae.tap
    reader = ActivationReader(
        importing.model_dir,
        model=model,
        layers=[tap.layer],
        site=tap.site,
        cache_dir=user_cache_dir(),
        progress=importing.progress,
    )
    ordinary = read_ordinary(reader, tap.layer)
    rows = ordinary.rows.astype(np.float32)
    sae, conversion = found.sae, {}
    if found.rank is not None:
        sae, agreement = threshold_for_rank(sae, found.rank, rows)
        conversion = agreement.as_dict()
    measured = measure(sae, rows)
    _require_explains(measured, found, importing)
    card = _card(importing, found, model=model, ordinary=ordinary, measured=measured, conversion=conversion)
    return save_sae(importing.out / f"{importing.name}.safetensors", sae, card, density=measured.density)


def measure(sae: Sae, rows: Float32) -> Measured:
    """What ordinary rows say of an autoencoder.

    Args:
        sae: with its thresholds.
        rows: (n, d_model), sinks left out.
    """
    active = np.zeros(sae.width)
    residual = 0.0
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        codes = sae.encode(part)
        active += (codes > 0).sum(axis=0)
        if not sae.is_transcoder:
            residual += float(np.square(part - sae.decode(codes, part), dtype=np.float64).sum())
    around = float(np.square(rows - rows.mean(axis=0), dtype=np.float64).sum())
    fvu = None if sae.is_transcoder else residual / around
    return Measured((active / len(rows)).astype(np.float32), float(active.sum() / len(rows)), fvu)


def _require_model(found: Found, model: ModelRef, importing: Importing) -> None:
    sae = found.sae
    if sae.d_model != model.d_model or sae.tap.layer >= model.num_layers:
        raise ImportedSaeError(
            f"{importing.path}: reads rows of {sae.d_model} dimensions at {sae.tap}; {model.id} has {model.d_model} "
            f"and the layers 0 to {model.num_layers - 1}. It belongs to another model: name that one with --model."
        )
    if found.model is not None and not importing.force and _plain(found.model) != _plain(model.id):
        raise ImportedSaeError(
            f"{importing.path}: was trained on {found.model!r} by its files, and --model is {model.id!r}. A fine-tuned "
            "model is another one too: on it, latents may mean something else. If you know that they fit, --force "
            "takes it, and the card says so."
        )


def _plain(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].rpartition(":")[2].casefold()


def _require_explains(measured: Measured, found: Found, importing: Importing) -> None:
    if measured.fvu is not None and measured.fvu >= 1.0 and not importing.force:
        raise ImportedSaeError(
            f"{importing.path}: leaves {measured.fvu:.2f} of the variance of ordinary rows at {found.sae.tap} of "
            f"{importing.model_id} unexplained: it explains nothing here. It was made for another model, place or "
            "scale of the input (--input-factor). --force takes it all the same."
        )


def _card(
    importing: Importing,
    found: Found,
    *,
    model: ModelRef,
    ordinary: Ordinary,
    measured: Measured,
    conversion: dict[str, Any],
) -> SaeCard:
    sae = found.sae
    return SaeCard(
        name=importing.name,
        description=importing.description or f"{sae.width} latents at {sae.tap}",
        model=model,
        skip_first=ordinary.skip_first,
        tensors_digest="0" * 64,
        tap=str(sae.tap),
        width=sae.width,
        activation=sae.activation,
        precision=importing.precision,
        origin=found.origin,
        corpus=found.corpus or importing.corpus,
        licence=importing.licence,
        conversion=conversion,
        median_norm=ordinary.median_norm,
        corpus_rows=len(ordinary.rows),
        corpus_digest=corpus_digest(),
        training={"imported_from": importing.path.name, "trained_on": found.model or NOT_STATED},
        evaluation={"ordinary_text": measured.as_dict()},
        created_by=importing.created_by,
    )
