"""``telltale canary``."""

from __future__ import annotations

from pathlib import Path

from probes.artifact import Artifact, write_card
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say


def canary(path: Path, model: str | None) -> None:
    """Add a canary to the card of an artifact, or write it anew; the tensors stay as they are.

    Raises:
        probes.errors.TelltaleError: the artifact is damaged, or the model is not the one on its card.
    """
    artifact = Artifact.load(path)
    from probes.fit.training.canary import canary_of

    name = model or DEFAULT_MODEL
    folder = embedded_folder(name) or Path(name)
    found = canary_of(artifact, model_dir=folder, progress=say)
    write_card(path, artifact.card.model_copy(update={"canary": found}))
    say(f"{path}: a canary of {len(found.tokens)} tokens, tolerance {found.tolerance:.3g}, by {found.reference}")
