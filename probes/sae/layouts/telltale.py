"""Our own: a ``.safetensors`` file with a ``.card.json`` beside it."""

from __future__ import annotations

from pathlib import Path

from probes.artifact import card_path_of
from probes.sae.file import load_sae
from probes.sae.layouts.base import Found, Layout, Stated, agreed_tap


class Telltale(Layout):
    """What ``save_sae`` wrote: read again to bring it to another precision or a fine-tuned model."""

    kind = "telltale"
    files = "a .safetensors file with its .card.json"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """See ``Layout.fits``."""
        return path.suffix == ".safetensors" and path.is_file() and card_path_of(path).is_file()

    @classmethod
    def read(cls, path: Path, stated: Stated) -> Found:
        """See ``Layout.read``."""
        stored = load_sae(path)
        agreed_tap(stored.tap, stated, path)
        return Found(stored.sae(), origin=stored.card.origin, model=stored.card.model.id, corpus=stored.card.corpus)
