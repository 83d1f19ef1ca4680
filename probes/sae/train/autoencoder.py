"""The parameters of a sparse autoencoder while it is trained; knows no activation function and no corpus."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

__all__ = ["Autoencoder"]

_MIN_NORM = 1e-8


class Autoencoder(torch.nn.Module):
    """An encoder and a decoder with rows of norm 1, in normalised coordinates.

    It begins tied: encoder row i is decoder row i, a random direction (Gao et al., 2024).

    Args:
        d_model: width of a row.
        width: number of latents.
        generator: of the random directions.
    """

    def __init__(self, d_model: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        rows = torch.randn((width, d_model), generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.encoder = torch.nn.Parameter(rows.clone())
        self.encoder_bias = torch.nn.Parameter(torch.zeros(width))
        self.decoder = torch.nn.Parameter(rows)
        self.decoder_bias = torch.nn.Parameter(torch.zeros(d_model))

    @property
    def width(self) -> int:
        """Number of latents."""
        return len(self.encoder)

    def pre_activations(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, d_model) to (n, width): ``W_e (x - b_d) + b_e``."""
        return linear(rows - self.decoder_bias, self.encoder, self.encoder_bias)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, width) to (n, d_model)."""
        return codes @ self.decoder + self.decoder_bias

    @torch.no_grad()
    def keep_gradient_tangent(self) -> None:
        """Take the part of the decoder's gradient away that would only change norms."""
        gradient = self.decoder.grad
        if gradient is not None:
            gradient -= (gradient * self.decoder).sum(dim=1, keepdim=True) * self.decoder

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every row of the decoder the norm 1 again."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(_MIN_NORM))
