"""JumpReLU: a trained threshold for each latent, an L0 penalty towards a target (Rajamanoharan et al., 2024).

Straight-through estimators with a rectangle kernel give the thresholds their gradients (arXiv:2407.14435).
"""

from __future__ import annotations

from typing import Any

import torch

from probes.sae.train.objective import Coded, Objective, smallest_kept

__all__ = ["JumpReLU"]

_LEAST = 1e-6


class _Jump(torch.autograd.Function):
    """``z`` where it is above the threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        z, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        to_threshold = -(threshold / ctx.bandwidth) * (gradient * near).sum(dim=0)
        return gradient * (z > threshold), to_threshold, None


class _Step(torch.autograd.Function):
    """1 where ``z`` is above the threshold, else 0; only the threshold gets a gradient."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        z, threshold = ctx.saved_tensors
        (gradient,) = gradients
        near = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        return None, -(gradient * near).sum(dim=0) / ctx.bandwidth, None


class JumpReLU(Objective):
    """Adds ``weight * (L0 / target - 1)^2`` to the loss.

    Args:
        width: number of latents.
        target: active latents per row, on average.
        bandwidth: of the kernel, in units of a pre-activation.
        weight: of the penalty, once it is warm.
        warm_up: part of the training over which the weight grows from 0, 0 to 1.
    """

    def __init__(self, width: int, *, target: float, bandwidth: float, weight: float, warm_up: float) -> None:
        super().__init__()
        self._target = target
        self._bandwidth = bandwidth
        self._weight = weight
        self._warm_up = warm_up
        # Its logarithm is trained, so that a threshold stays positive.
        self.log_threshold = torch.nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def begin(self, pre_activations: torch.Tensor) -> None:
        """See ``Objective.begin``: one threshold for all, with which the target is met at the start."""
        kept = max(round(self._target * len(pre_activations)), 1)
        least = max(smallest_kept(pre_activations.relu(), kept), _LEAST)
        self.log_threshold.fill_(torch.tensor(least).log())

    def code(self, pre_activations: torch.Tensor, progress: float) -> Coded:
        """See ``Objective.code``."""
        threshold = self.log_threshold.exp()
        codes: torch.Tensor = _Jump.apply(pre_activations, threshold, self._bandwidth)  # type: ignore[no-untyped-call]
        steps: torch.Tensor = _Step.apply(pre_activations, threshold, self._bandwidth)  # type: ignore[no-untyped-call]
        l0 = steps.sum(dim=1).mean()
        weight = self._weight * min(progress / self._warm_up, 1.0) if self._warm_up else self._weight
        return Coded(codes, weight * (l0 / self._target - 1).square())

    def thresholds(self, width: int) -> torch.Tensor:
        """See ``Objective.thresholds``."""
        return self.log_threshold.detach().exp()
