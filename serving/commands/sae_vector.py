"""``telltale sae vector``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import serving
from probes.errors import did_you_mean
from probes.steering.artifact import Safety
from serving.commands.model import say
from serving.commands.sae_features import FeaturesError, format_of, model_of

__all__ = ["VectorOptions", "safety_of", "vector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorOptions:
    """As on the command line."""

    pairs: Path
    name: str
    more_is: str
    positive: int
    negative: int
    max_density: float
    text_format: str
    description: str
    model: str | None
    out: Path


def vector(sae: Path, options: VectorOptions) -> None:
    """Make a steering direction, and write it.

    Raises:
        probes.errors.TelltaleError: the SAE, the pairs or the model are not usable.
    """
    from probes.fit.steer.vector import Subject
    from probes.packs.saes import open_sae
    from probes.sae.feature_vector import Filters, vector_from_features

    safety = safety_of(options.more_is)
    file = open_sae(sae)
    folder, model_id = model_of(options.model)
    subject = Subject(
        folder,
        model_id,
        file.tap.layer,
        options.name,
        options.description or f"latents of {file.card.name} by {options.pairs.name}",
        safety,
        f"telltale {serving.__version__}",
    )
    made = vector_from_features(
        file,
        subject,
        options.pairs,
        filters=Filters(max_density=options.max_density, positive=options.positive, negative=options.negative),
        text_format=format_of(options.text_format),
        out=options.out,
        progress=say,
    )
    say(f"wrote {made.path}: {made.card.tap}; judge it: telltale steer eval {made.path}")


def safety_of(name: str) -> Safety:
    """What more of it makes the model.

    Raises:
        FeaturesError: it is no such word.
    """
    known = [each.value for each in Safety]
    if name not in known:
        raise FeaturesError(f"--more-is is {name!r}. {did_you_mean(name, known)}")
    return Safety(name)
