"""Layouts of files that sparse autoencoders come in. One file per library, found by discovery."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from probes.discovery import discover
from probes.errors import did_you_mean
from probes.sae.layouts.base import Found, Layout, LayoutError, Stated

__all__ = ["Found", "Layout", "LayoutError", "Stated", "layout_kinds", "read_layout"]


def layout_kinds() -> Mapping[str, type[Layout]]:
    """Every layout by its kind."""
    return discover(sys.modules[__name__], Layout)


def read_layout(path: Path, stated: Stated, *, kind: str | None = None) -> Found:
    """Read a sparse autoencoder, whichever library wrote it.

    Args:
        path: a folder, or a file in it.
        stated: what the files may lack.
        kind: the layout; found out if None.
    Raises:
        LayoutError: it is laid out like none of them or like several, or cannot be served.
        probes.sae.sae.SaeError: its parts do not fit together.
    """
    kinds = layout_kinds()
    if kind is not None:
        if kind not in kinds:
            raise LayoutError(f"the layout {kind!r} is not known. {did_you_mean(kind, kinds)}")
        return kinds[kind].read(path, stated)
    if not path.exists():
        raise LayoutError(f"{path}: there is no such folder or file. Name what was downloaded.")
    fitting = [cls for cls in kinds.values() if cls.fits(path)]
    if not fitting:
        known = "; ".join(f"{name}: {cls.files}" for name, cls in kinds.items())
        raise LayoutError(f"{path}: holds no sparse autoencoder in a layout that is read ({known}).")
    if len(fitting) > 1:
        names = ", ".join(cls.kind for cls in fitting)
        raise LayoutError(f"{path}: looks like several layouts ({names}). Say which with --layout.")
    return fitting[0].read(path, stated)
