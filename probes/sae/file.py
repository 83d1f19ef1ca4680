"""A sparse autoencoder on disk: a safetensors file in float16 or float32 and, beside it, a JSON card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from probes.artifact import ArtifactError, Stored, save_tensors
from probes.card import ArtifactCard, Digest
from probes.sae.normalisation import Normalisation
from probes.sae.sae import Activation, Sae, SaeError, require_latents
from probes.taps import Tap

_PER_LATENT = ("encoder", "encoder_bias", "threshold", "decoder")
DENSITY = "density"
"""Name of the optional tensor: the share of the corpus' rows at which each latent is active."""


class Precision(StrEnum):
    """In which the two matrices are stored; biases and thresholds are always float32."""

    FLOAT16 = "float16"
    """Half the size. Codes differ by about 1e-3 of their size from those of float32."""
    FLOAT32 = "float32"


class SaeCard(ArtifactCard):
    """Everything that is known about one sparse autoencoder.

    ``evaluation`` holds its metrics (``fvu``, ``l0``, ``dead_share``, ``ce_recovered``, ...) beside their controls, and
    ``training`` how it was trained or what it was imported from.
    """

    tap: str = Field(description="what it reads, e.g. resid_post.15")
    output_tap: str | None = Field(default=None, description="what a transcoder predicts; None: what it reads")
    width: int = Field(gt=0, description="number of latents")
    activation: Activation = Field(description="what it was trained with; served, each is a threshold")
    normalisation: Normalisation = Field(default=Normalisation.NONE, description="of each row before it is encoded")
    precision: Precision = Field(description="of the two matrices")
    origin: str = Field(min_length=1, description="who made it and in which format it was, e.g. 'SAELens 6.54: res-jb'")
    corpus: str = Field(min_length=1, description="the text that it was trained on; 'not stated' where it is not known")
    licence: str = Field(min_length=1, description="of the weights; 'not stated' where it is not known")
    conversion: dict[str, Any] = Field(
        default_factory=dict, description="how a threshold stands for a rank, and how far the active sets agree"
    )
    median_norm: float | None = Field(
        default=None,
        gt=0,
        description="of ordinary rows at the tap: the unit of doses; None: it cannot be steered with",
    )
    corpus_rows: int | None = Field(default=None, gt=0, description="rows that median_norm and density rest on")
    corpus_digest: Digest | None = None

    @field_validator("tap", "output_tap")
    @classmethod
    def _a_tap(cls, tap: str | None) -> str | None:
        if tap is not None:
            Tap.parse(tap)
        return tap

    @model_validator(mode="after")
    def _norm_of_something(self) -> Self:
        if (self.median_norm is None) != (self.corpus_rows is None):
            raise ValueError("median_norm and corpus_rows stand together, or neither is there")
        return self


class SaeFile(Stored[SaeCard]):
    """Tensors and card."""

    card_type = SaeCard
    what = "sparse autoencoder"
    how = "telltale sae import, or telltale sae train"

    @property
    def tap(self) -> Tap:
        """What it reads."""
        return Tap.parse(self.card.tap)

    def sae(self) -> Sae:
        """All of it, in float32.

        Raises:
            probes.artifact.ArtifactError: a tensor is missing or has another shape than the card says.
        """
        return self._of(slice(None))

    def latents(self, latents: Sequence[int]) -> Sae:
        """Some latents only; no other row is converted or kept.

        Raises:
            SaeError: a latent does not exist, or is named twice.
            probes.artifact.ArtifactError: see ``sae``.
        """
        try:
            chosen = require_latents(latents, self.card.width)
        except SaeError as error:
            raise SaeError(f"{self.path}: {error}") from error
        return self._of(chosen)

    def density(self) -> npt.NDArray[np.float32] | None:
        """(width,) share of the corpus' rows at which each latent is active; None if it was not measured.

        Raises:
            probes.artifact.ArtifactError: it has another shape.
        """
        if DENSITY not in self.tensors:
            return None
        return self.vector(DENSITY, self.card.width).astype(np.float32)

    def _of(self, chosen: slice | npt.NDArray[np.intp]) -> Sae:
        card = self.card
        width, d_model = card.width, card.model.d_model
        shapes = {"encoder": (width, d_model), "encoder_bias": (width,), "threshold": (width,)}
        shapes |= {"decoder": (width, d_model), "decoder_bias": (d_model,)}
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise ArtifactError(f"{self.path}: tensor {name!r} is missing; there are {sorted(self.tensors)}.")
            if self.tensors[name].shape != shape:
                raise ArtifactError(
                    f"{self.path}: tensor {name!r} has the shape {self.tensors[name].shape}; by its card it must be "
                    f"{shape}. Copy both files again."
                )
        parts = {name: self.tensors[name][chosen].astype(np.float32) for name in _PER_LATENT}
        try:
            return Sae(
                tap=self.tap,
                activation=card.activation,
                encoder=parts["encoder"],
                encoder_bias=parts["encoder_bias"],
                threshold=parts["threshold"],
                decoder=parts["decoder"],
                decoder_bias=self.tensors["decoder_bias"].astype(np.float32),
                normalisation=card.normalisation,
                output_tap=None if card.output_tap is None else Tap.parse(card.output_tap),
            )
        except SaeError as error:
            raise ArtifactError(f"{self.path}: {error}") from error


def load_sae(path: Path) -> SaeFile:
    """Read ``x.safetensors`` and ``x.card.json``; the matrices stay in the precision of the file.

    Raises:
        probes.artifact.ArtifactError: a file is missing or damaged, or the card does not fit the tensors.
    """
    return SaeFile.load(path)


def save_sae(path: Path, sae: Sae, card: SaeCard, *, density: npt.NDArray[np.floating] | None = None) -> SaeFile:
    """Write a sparse autoencoder and its card, each atomically.

    What the card says of tap, width, activation and normalisation is taken from ``sae``; the matrices are written in
    the card's precision.

    Args:
        path: ends in ``.safetensors``.
        sae: the weights.
        card: all else; ``tensors_digest`` is set here.
        density: (width,) share of the corpus' rows at which each latent is active.
    Raises:
        probes.artifact.ArtifactError: the path ends otherwise.
        SaeError: the width of rows is not that of the card's model, or a weight is too large for float16.
    """
    if sae.d_model != card.model.d_model:
        raise SaeError(
            f"it reads rows of {sae.d_model} dimensions; the model {card.model.id!r} has {card.model.d_model}. "
            "It belongs to another model."
        )
    stored = np.float16 if card.precision is Precision.FLOAT16 else np.float32
    with np.errstate(over="ignore"):  # refused below, by name
        matrices = {"encoder": sae.encoder.astype(stored), "decoder": sae.decoder.astype(stored)}
    for name, matrix in matrices.items():
        if not np.all(np.isfinite(matrix)):
            raise SaeError(f"{name} holds a value that float16 cannot: store it in float32.")
    tensors: dict[str, npt.NDArray[np.generic]] = {
        **matrices,
        "encoder_bias": sae.encoder_bias,
        "threshold": sae.threshold,
        "decoder_bias": sae.decoder_bias,
    }
    if density is not None:
        if density.shape != (sae.width,):
            raise SaeError(f"density has the shape {density.shape}; it must be ({sae.width},).")
        tensors[DENSITY] = density.astype(np.float32)
    told = {
        "tap": str(sae.tap),
        "output_tap": None if sae.output_tap is None else str(sae.output_tap),
        "width": sae.width,
        "activation": sae.activation,
        "normalisation": sae.normalisation,
    }
    kept: Mapping[str, npt.NDArray[np.generic]] = tensors
    return SaeFile(path=path, card=save_tensors(path, card.model_copy(update=told), kept), tensors=kept)
