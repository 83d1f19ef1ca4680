"""``telltale train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serving.builtin import DEFAULT_MODEL
from serving.commands.encoder import load_encoder, read_encoder
from serving.commands.model import embedded_folder, say


def train(recipes: Sequence[Path], model: str | None, out: Path, encoder: str) -> None:
    """Train one detector after the other on a model and write their artifacts.

    Raises:
        probes.errors.TelltaleError: the recipe, the data, the encoder or the model is not usable.
    """
    chosen = read_encoder(encoder)

    from probes.cachedir import user_cache_dir
    from probes.fit.training.train import train as fit

    name = model or DEFAULT_MODEL
    folder = embedded_folder(name) or Path(name)
    peer = load_encoder(chosen, model_dir=folder, cache_dir=user_cache_dir())
    for recipe in recipes:
        artifact = fit(recipe, model_dir=folder, model_id=name, out=out, progress=say, encoder=peer)
        say(f"wrote {artifact.path}")
