"""``telltale train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say


def train(recipes: Sequence[Path], model: str | None, out: Path) -> None:
    """Train one detector after the other on a model and write their artifacts.

    Raises:
        probes.errors.TelltaleError: the recipe, the data or the model is not usable.
    """
    from probes.fit.training.train import train as fit

    name = model or DEFAULT_MODEL
    folder = embedded_folder(name) or Path(name)
    for recipe in recipes:
        artifact = fit(recipe, model_dir=folder, model_id=name, out=out, progress=say)
        say(f"wrote {artifact.path}")
