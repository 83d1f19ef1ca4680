"""A sparse autoencoder in the form that is served. Knows no file, no engine and no tensor library but numpy.

Every kind that a latent can be read of alone comes to one formula:

    x_i = w_i . norm(s) + b_i        f_i = x_i if x_i > threshold_i else 0        s' = f W_d + b_d

* ReLU: the threshold is 0.
* JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): the threshold, or 0 where it is negative.
* Gated (Rajamanoharan et al. 2024, arXiv 2404.16014): gate and magnitude share their direction, so that the gate is a
  threshold on the magnitude (see ``Sae.gated``).
* TopK and BatchTopK (Gao et al. 2024; Bussmann et al. 2024): a threshold that stands for the rank; for BatchTopK it is
  the one that its authors infer with, for TopK an approximation whose agreement is measured when it is imported.

A decoder bias that is subtracted before encoding, and a constant factor on the input, are folded into the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError
from probes.sae.normalisation import Normalisation, row_scale
from probes.taps import Tap

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class SaeError(TelltaleError, ValueError):
    """A sparse autoencoder whose parts do not fit together, or a latent that it does not have."""


class Activation(StrEnum):
    """What made the codes sparse when it was trained; served, each is a threshold."""

    RELU = "relu"
    JUMPRELU = "jumprelu"
    GATED = "gated"
    TOPK = "topk"
    BATCHTOPK = "batchtopk"


@dataclass(frozen=True, slots=True, eq=False)
class Sae:
    """A sparse autoencoder, or some of its latents.

    Row i of encoder and decoder belongs to latent i. All arrays are float32, finite and read-only.

    Attributes:
        tap: what it reads.
        activation: what it was trained with.
        encoder: (width, d_model).
        encoder_bias: (width,).
        threshold: (width,), 0 or more; a latent is active strictly above it.
        decoder: (width, d_model), not of length 1 in general.
        decoder_bias: (d_model,).
        normalisation: what each row is divided by before it is encoded.
        output_tap: what the decoder reconstructs, where that is another place than ``tap`` (a transcoder).

    Raises:
        SaeError: shapes do not fit together, a value is not finite or a threshold is negative.
    """

    tap: Tap
    activation: Activation
    encoder: Float32
    encoder_bias: Float32
    threshold: Float32
    decoder: Float32
    decoder_bias: Float32
    normalisation: Normalisation = Normalisation.NONE
    output_tap: Tap | None = None

    def __post_init__(self) -> None:
        """Check the parts and make them read-only."""
        width, d_model = self.encoder.shape if self.encoder.ndim == 2 else (0, 0)  # noqa: PLR2004 - a matrix
        if not width or not d_model:
            raise SaeError(f"the encoder has the shape {self.encoder.shape}; it must be (latents, d_model).")
        shapes = {"encoder": (width, d_model), "encoder_bias": (width,), "threshold": (width,)}
        shapes |= {"decoder": (width, d_model), "decoder_bias": (d_model,)}
        for name, shape in shapes.items():
            given = getattr(self, name)
            if given.shape != shape:
                raise SaeError(f"{name} has the shape {given.shape}; with this encoder it must be {shape}.")
            if not np.all(np.isfinite(given)):
                raise SaeError(f"{name} holds NaN or infinite values: the file is damaged, copy it again.")
            part = np.ascontiguousarray(given, dtype=np.float32).view()
            part.flags.writeable = False
            object.__setattr__(self, name, part)
        if np.any(self.threshold < 0):
            raise SaeError("threshold holds negative values; a served latent has 0 or more.")

    @property
    def width(self) -> int:
        """Number of latents."""
        return int(self.encoder.shape[0])

    @property
    def d_model(self) -> int:
        """Width of the rows that are read."""
        return int(self.encoder.shape[1])

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another place than the one that it reads: its latents can be read, not written."""
        return self.output_tap is not None and self.output_tap != self.tap

    @classmethod
    def folded(
        cls,
        *,
        tap: Tap,
        activation: Activation,
        encoder: npt.NDArray[np.floating],
        encoder_bias: npt.NDArray[np.floating],
        decoder: npt.NDArray[np.floating],
        decoder_bias: npt.NDArray[np.floating],
        threshold: npt.NDArray[np.floating] | float = 0.0,
        subtracts_decoder_bias: bool = False,
        input_factor: float = 1.0,
        normalisation: Normalisation = Normalisation.NONE,
        output_tap: Tap | None = None,
    ) -> Self:
        """From weights as they were trained: ``x = w (factor norm(s) - [b_d]) + b``; folded in float64.

        Args:
            tap: what it reads.
            activation: what it was trained with.
            encoder: (width, d_model).
            encoder_bias: (width,).
            decoder: (width, d_model).
            decoder_bias: (d_model,).
            threshold: (width,) or one number for all; negative ones become 0, as a ReLU stands behind them.
            subtracts_decoder_bias: whether the decoder bias is taken from the (scaled) input.
            input_factor: the input is multiplied by it, and the reconstruction divided.
            normalisation: of each row, before both.
            output_tap: see the class.
        """
        rows = encoder.astype(np.float64)
        bias = encoder_bias.astype(np.float64)
        if subtracts_decoder_bias and rows.ndim == 2 and decoder_bias.shape == rows.shape[1:]:  # noqa: PLR2004
            bias = bias - rows @ decoder_bias.astype(np.float64)
        if normalisation is Normalisation.LAYER:
            # (s - mean) . w is s . (w - mean of w): only the standard deviation is left to divide by.
            rows = rows - rows.mean(axis=1, keepdims=True)
        limit = np.broadcast_to(np.asarray(threshold, dtype=np.float64), bias.shape)
        return cls(
            tap=tap,
            activation=activation,
            encoder=(rows * input_factor).astype(np.float32),
            encoder_bias=bias.astype(np.float32),
            threshold=np.maximum(limit, 0.0).astype(np.float32),
            decoder=(decoder.astype(np.float64) / input_factor).astype(np.float32),
            decoder_bias=(decoder_bias.astype(np.float64) / input_factor).astype(np.float32),
            normalisation=normalisation,
            output_tap=output_tap,
        )

    @classmethod
    def gated(
        cls,
        *,
        tap: Tap,
        encoder: npt.NDArray[np.floating],
        gate_bias: npt.NDArray[np.floating],
        log_gain: npt.NDArray[np.floating],
        magnitude_bias: npt.NDArray[np.floating],
        decoder: npt.NDArray[np.floating],
        decoder_bias: npt.NDArray[np.floating],
        subtracts_decoder_bias: bool = False,
        input_factor: float = 1.0,
        normalisation: Normalisation = Normalisation.NONE,
    ) -> Self:
        """From a gated one: ``relu(exp(log_gain) w.s + magnitude_bias)`` where ``w.s + gate_bias > 0``, else 0.

        With ``y`` the size before its ReLU, ``w.s = (y - magnitude_bias) / exp(log_gain)``: the gate is open exactly
        where ``y > magnitude_bias - exp(log_gain) gate_bias``.
        """
        gain = np.exp(log_gain.astype(np.float64))
        size_bias = magnitude_bias.astype(np.float64)
        return cls.folded(
            tap=tap,
            activation=Activation.GATED,
            encoder=encoder.astype(np.float64) * gain[:, None],
            encoder_bias=size_bias,
            decoder=decoder,
            decoder_bias=decoder_bias,
            threshold=size_bias - gain * gate_bias.astype(np.float64),
            subtracts_decoder_bias=subtracts_decoder_bias,
            input_factor=input_factor,
            normalisation=normalisation,
        )

    def only(self, latents: Sequence[int] | npt.NDArray[np.integer]) -> Self:
        """The same, cut down to some latents, in the order in which they are named.

        Raises:
            SaeError: none is named, or one that there is not.
        """
        chosen = require_latents(latents, self.width)
        return replace(
            self,
            encoder=self.encoder[chosen],
            encoder_bias=self.encoder_bias[chosen],
            threshold=self.threshold[chosen],
            decoder=self.decoder[chosen],
        )

    def pre_activations(self, rows: npt.NDArray[np.floating]) -> Float32:
        """``x`` of the formula: (n, d_model) -> (n, width), before the threshold.

        Raises:
            SaeError: the rows have another width.
        """
        given = self._rows(rows)
        products = given @ self.encoder.T
        if self.normalisation is not Normalisation.NONE:
            products /= self._scale(given)[:, None].astype(np.float32)
        products += self.encoder_bias
        return products

    def encode(self, rows: npt.NDArray[np.floating]) -> Float32:
        """The codes: (n, d_model) -> (n, width), 0 where a latent is not active.

        The products are taken in float32: equal to the library that the weights are from within 1e-5 of the codes'
        scale, with the same active set outside that distance from the threshold.

        Raises:
            SaeError: the rows have another width.
        """
        codes = self.pre_activations(rows)
        codes[codes <= self.threshold] = 0.0
        return codes

    def encode_some(self, rows: npt.NDArray[np.floating], latents: Sequence[int]) -> Float32:
        """The codes of some latents, at their price: (n, d_model) -> (n, len(latents)).

        Raises:
            SaeError: the rows have another width, or a latent does not exist.
        """
        return self.only(latents).encode(rows)

    def decode(self, codes: npt.NDArray[np.floating], rows: npt.NDArray[np.floating] | None = None) -> Float32:
        """The reconstruction: (n, width) -> (n, d_model).

        Args:
            codes: of ``encode``, or changed ones.
            rows: those that were encoded: their scale is given back. Needed where rows are normalised. For ``LAYER``
                the 1e-5 that guards the division is given back too, which SAELens leaves out.
        Raises:
            SaeError: the codes have another width, or the rows are missing or of another shape.
        """
        if codes.ndim != 2 or codes.shape[1] != self.width:  # noqa: PLR2004 - a matrix
            raise SaeError(f"codes have the shape {codes.shape}; they must be (n, {self.width}).")
        found: Float32 = codes.astype(np.float32, copy=False) @ self.decoder + self.decoder_bias
        if self.normalisation is Normalisation.NONE:
            return found
        if rows is None or len(rows) != len(codes):
            raise SaeError(
                f"it divides each row by its own scale ({self.normalisation.value}): pass the rows that were encoded "
                "to decode, as many as there are codes."
            )
        given = self._rows(rows)
        found *= self._scale(given)[:, None].astype(np.float32)
        if self.normalisation is Normalisation.LAYER:
            found += given.mean(axis=1, keepdims=True)
        return found

    def reconstruct(self, rows: npt.NDArray[np.floating]) -> Float32:
        """``decode(encode(rows))``: (n, d_model) -> (n, d_model)."""
        return self.decode(self.encode(rows), rows)

    def directions(self, latents: Sequence[int]) -> tuple[Float64, Float64]:
        """What has to be read of a row for some latents: ``x = (s @ weight) / scale(s) + bias``.

        Returns: weight (d_model, m) and bias (m,), float64; the scale is 1 without a normalisation, else ``row_scale``.

        Raises:
            SaeError: none is named, or one that there is not.
        """
        chosen = require_latents(latents, self.width)
        weight = np.ascontiguousarray(self.encoder[chosen].T.astype(np.float64))
        return weight, self.encoder_bias[chosen].astype(np.float64)

    def _rows(self, rows: npt.NDArray[np.floating]) -> Float32:
        if rows.ndim != 2 or rows.shape[1] != self.d_model:  # noqa: PLR2004 - a matrix
            raise SaeError(f"rows have the shape {rows.shape}; they must be (n, {self.d_model}).")
        return rows.astype(np.float32, copy=False)

    def _scale(self, rows: Float32) -> Float64:
        wide = rows.astype(np.float64)
        return row_scale(self.normalisation, np.einsum("nd,nd->n", wide, wide), wide.mean(axis=1), self.d_model)


def require_latents(latents: Sequence[int] | npt.NDArray[np.integer], width: int) -> npt.NDArray[np.intp]:
    """The latents as indices: (m,).

    Raises:
        SaeError: none is named, one is named twice, or there is none of that number.
    """
    chosen = np.asarray(latents, dtype=np.intp)
    if chosen.ndim != 1 or not len(chosen):
        raise SaeError("no latent is named: give one or more numbers.")
    outside = chosen[(chosen < 0) | (chosen >= width)]
    if len(outside):
        raise SaeError(f"latent {int(outside[0])} does not exist: there are {width}, numbered 0 to {width - 1}.")
    if len(np.unique(chosen)) != len(chosen):
        values, counts = np.unique(chosen, return_counts=True)
        raise SaeError(f"latent {int(values[counts > 1][0])} is named twice; name each once.")
    return chosen
