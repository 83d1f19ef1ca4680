"""The sparse autoencoder by which a server explains flags: found, and checked against the model. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from monitor.yaml_file import PolicyFile
from probes.card import ModelRef
from probes.sae.file import SaeCard, load_sae
from probes.taps import Tap
from serving.sae_path import sae_path


@dataclass(frozen=True, slots=True)
class Explainer:
    """It, without its weights: the one process that encodes loads them.

    Attributes:
        path: of the file.
        card: what it says about itself.
    """

    path: Path
    card: SaeCard

    @property
    def tap(self) -> Tap:
        """What it reads."""
        return Tap.parse(self.card.tap)


def find_explainer(file: PolicyFile, model: ModelRef) -> Explainer | None:
    """What a policy file's ``explain`` names; None if it has none.

    Args:
        file: the policy file.
        model: that is served, or that the file's detectors were made on.
    Raises:
        PolicyError: a sparse autoencoder that does not ship is asked for.
        probes.artifact.ArtifactError: its file is missing or damaged, or it belongs to another model.
    """
    settings = file.config.explain
    if settings is None:
        return None
    stored = load_sae(sae_path(file, ("explain", "sae"), settings.sae))
    stored.require_model(model)
    return Explainer(stored.path, stored.card)
