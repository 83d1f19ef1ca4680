"""Latents that have not been active for long: what brings them back (AuxK of Gao et al., 2024, arXiv:2406.04093)."""

from __future__ import annotations

import torch

from probes.sae.train.autoencoder import Autoencoder

__all__ = ["DeadLatents"]


class DeadLatents(torch.nn.Module):
    """Counts how long each latent has been idle, and lets idle ones explain what the others leave over.

    Args:
        width: number of latents.
        after: rows without any activity, after which a latent counts as dead.
        most: of the dead latents so many of the largest may be active in a row.
    """

    idle: torch.Tensor

    def __init__(self, width: int, *, after: int, most: int) -> None:
        super().__init__()
        self._after = after
        self._most = most
        self.register_buffer("idle", torch.zeros(width, dtype=torch.int64))

    @property
    def mask(self) -> torch.Tensor:
        """(width,), whether a latent is dead."""
        return self.idle >= self._after

    def count(self, codes: torch.Tensor) -> None:
        """See a batch: (n, width)."""
        active = (codes.detach() > 0).any(dim=0)
        self.idle += len(codes)
        self.idle[active] = 0

    def loss(self, model: Autoencoder, pre_activations: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Share of the residual's energy that the dead latents leave over; 0 where none is dead.

        Args:
            model: the autoencoder.
            pre_activations: (n, width).
            residual: (n, d_model), what the reconstruction leaves over.
        """
        dead = self.mask
        number = int(dead.sum())
        if not number:
            return torch.zeros(())
        values = pre_activations[:, dead].relu()
        if number > self._most:
            values = _largest(values, self._most)
        target = residual.detach()
        left = (target - values @ model.decoder[dead]).square().sum()
        return left / target.square().sum().clamp_min(torch.finfo(target.dtype).tiny)


def _largest(values: torch.Tensor, most: int) -> torch.Tensor:
    """The ``most`` largest of each row, the others 0."""
    array = values.detach().cpu().numpy().copy()
    place = array.shape[1] - most
    array.partition(place, axis=1)
    least = torch.from_numpy(array[:, place].copy())
    return values * (values >= least[:, None])
