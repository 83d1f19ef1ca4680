"""A steer at another strength, as the engine writes it for a request that asks for a share of it."""

from __future__ import annotations

from dataclasses import replace

from probes.steering.base import Update

__all__ = ["scaled"]


def scaled(update: Update, factor: float) -> Update:
    """What is written is multiplied, before the limit of the dose.

    Args:
        update: of a row.
        factor: above 0.
    """
    return replace(
        update,
        constant=update.constant * factor,
        linear=update.linear * factor,
        rectified=update.rectified * factor,
    )
