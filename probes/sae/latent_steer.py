"""A latent of a sparse autoencoder as something to write to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from probes.card import ModelRef
from probes.sae.file import SaeCard, SaeFile
from probes.sae.normalisation import Normalisation
from probes.sae.sae import SaeError
from probes.steering.artifact import Safety, lowers_safety
from probes.steering.base import Latent, Operator, SteerError, Vector
from probes.taps import Site, Tap


@dataclass(frozen=True, slots=True)
class LatentSteer:
    """One latent, with what is known of it.

    Attributes:
        stored: the sparse autoencoder.
        latent: its number.
        more_is: what more of it does to the model's safety; None: nobody has said.
    """

    stored: SaeFile
    latent: int
    more_is: Safety | None
    what: ClassVar[str] = "sparse autoencoder"

    @property
    def card(self) -> SaeCard:
        """Of the autoencoder."""
        return self.stored.card

    @property
    def tap(self) -> Tap:
        """Where it is written: where it is read."""
        return self.stored.tap

    @property
    def skip_first(self) -> int:
        """Leading positions that are never written to."""
        return self.card.skip_first

    def require_model(self, served: ModelRef) -> None:
        """Refuse a model that is not the one on the card.

        Raises:
            probes.artifact.ArtifactError: names each field that differs.
        """
        self.stored.require_model(served)

    def unsafe(self, operator: Operator) -> str | None:
        """See ``probes.steering.steer.Steerable``; what nobody has said may be anything."""
        if self.more_is is None:
            return (
                f"nobody has said what more of latent {self.latent} of {self.card.name!r} does to the model's safety. "
                "Say more_is: safer, less_safe or neutral."
            )
        if not any(lowers_safety(self.more_is, sign) for sign in operator.signs):
            return None
        return (
            f"{operator.kind!r} may make {'less' if self.more_is is Safety.SAFER else 'more'} of latent {self.latent} "
            f"of {self.card.name!r}, of which more is {self.more_is.value!r}: the model would become less safe."
        )

    def steering_vector(self) -> Vector:
        """The decoder row at length 1, and how active the latent is.

        Raises:
            SteerError: there is no such latent, or it cannot be written to, with the reason.
            probes.artifact.ArtifactError: the file is damaged.
        """
        try:
            row = self.stored.latents([self.latent])
        except SaeError as error:
            raise SteerError(str(error)) from error
        median = self.card.median_norm
        if self.tap.site is not Site.RESID_POST or row.is_transcoder:
            raise SteerError(
                f"{self.card.name!r} reads {self.tap} and its decoder writes {row.output_tap or self.tap}; what is "
                "written to is the stream, where it was read: resid_post.<layer>."
            )
        if row.normalisation is not Normalisation.NONE:
            raise SteerError(
                f"{self.card.name!r} divides each row by its own scale ({row.normalisation.value}): how active a "
                "latent is, is no straight function of the row, which is what the engine can write by. Its latents can "
                "be detectors."
            )
        if median is None:
            raise SteerError(
                f"the card of {self.card.name!r} has no median norm, the unit of doses. telltale sae import "
                f"{self.stored.path} --name {self.card.name} measures it."
            )
        decoder = row.decoder[0].astype(np.float64)
        length = float(np.linalg.norm(decoder))
        if length == 0:
            raise SteerError(
                f"latent {self.latent} of {self.card.name!r} has a decoder row of zeros: it writes nothing."
            )
        latent = Latent(
            read=row.encoder[0].astype(np.float64),
            bias=float(row.encoder_bias[0]),
            threshold=float(row.threshold[0]),
            length=length,
        )
        return Vector(decoder / length, median_norm=median, mean=0.0, ceiling=0.0, latent=latent)
