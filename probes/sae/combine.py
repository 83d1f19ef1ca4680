"""How the codes of several latents become one score of a token, and how that is written on a detector's card."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from probes.sae.normalisation import Normalisation


class Combine(StrEnum):
    """What is made of the codes of a token."""

    MAX = "max"
    """The largest."""
    SUM = "sum"
    """All of them, added."""
    SINGLE = "single"
    """The one latent's code, as it is."""
    WEIGHTED = "weighted"
    """``intercept + sum of weight * code``: a k-sparse probe (Gurnee et al. 2023, arXiv 2305.01610)."""


class LatentParameters(BaseModel):
    """The parameters of a detector of the kind ``sae_latent``, on its card."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    combine: Combine = Combine.SUM
    normalisation: Normalisation = Normalisation.NONE
    sae: str = Field(default="", description="name of the sparse autoencoder that the latents are of")
    latents: tuple[int, ...] = Field(default=(), description="their numbers there")

    @model_validator(mode="after")
    def _one_where_one_is_said(self) -> Self:
        if self.combine is Combine.SINGLE and len(self.latents) > 1:
            raise ValueError(f"combine is 'single' and {len(self.latents)} latents are named; say max, sum or weighted")
        return self
