"""``telltale sae detector``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

import serving
from probes.artifact import save_artifact
from probes.errors import TelltaleError, did_you_mean
from probes.packs.saes import open_sae
from probes.sae.combine import Combine
from probes.sae.latent_artifact import latent_artifact
from serving.commands.model import say


class SaeDetectorError(TelltaleError, ValueError):
    """An option says nothing that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeDetectorOptions:
    """What the command line says; see its help."""

    latents: str
    name: str
    combine: str | None
    weights: str
    intercept: float
    description: str
    out: Path


def sae_detector(path: Path, options: SaeDetectorOptions) -> None:
    """Write a detector over some latents of a sparse autoencoder; it is calibrated like any other.

    Raises:
        probes.errors.TelltaleError: the file or an option is not usable.
    """
    latents = [int(number) for number in _numbers("--latents", options.latents, whole=True)]
    words = [word.value for word in Combine]
    combine = options.combine or (Combine.SINGLE.value if len(latents) == 1 else "")
    if combine not in words:
        said = repr(combine) if combine else f"left out, and {len(latents)} latents are named"
        raise SaeDetectorError(f"--combine is {said}. {did_you_mean(combine, words)}")
    try:
        made = latent_artifact(
            open_sae(path),
            latents,
            name=options.name,
            combine=Combine(combine),
            weights=_numbers("--weights", options.weights, whole=False),
            intercept=options.intercept,
            description=options.description,
            path=options.out / f"{options.name}.safetensors",
            created_by=f"telltale {serving.__version__}",
        )
    except ValidationError as error:
        raise SaeDetectorError(
            f"--name is {options.name!r}: a detector's name has lower-case letters, digits and '_', and begins with a "
            "letter."
        ) from error
    saved = save_artifact(made.path, made.card, made.tensors)
    say(
        f"wrote {saved.path}: {combine} of {len(latents)} latents at {saved.card.taps[0]}; calibrate it before a rule "
        "asks for a rate of false alarms (telltale calibrate)"
    )


def _numbers(option: str, text: str, *, whole: bool) -> list[float]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return [int(part) if whole else float(part) for part in parts]
    except ValueError as error:
        kind = "whole numbers" if whole else "numbers"
        raise SaeDetectorError(f"{option} is {text!r}; it must be {kind} with commas between: 1742,88.") from error
