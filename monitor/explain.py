"""The ``explain`` section of the policy file: which flagged requests are explained, by what, and at what cost."""

from __future__ import annotations

from pydantic import Field

from monitor.strict import Strict


class ExplainSettings(Strict):
    """Which latents of a sparse autoencoder were active where a rule fired; in the audit trail, after the reply."""

    sae: str = Field(description="a sparse autoencoder: path, relative to the policy file, or builtin:PACK/NAME")
    tokens: int = Field(default=4, ge=1, le=16, description="tokens told of a request: those with the highest scores")
    top: int = Field(default=10, ge=1, le=64, description="latents told of a token")
    per_minute: int = Field(
        default=6, ge=1, le=600, description="requests explained in a minute; each is computed twice more"
    )
    queue: int = Field(
        default=16, ge=1, le=1024, description="flagged requests that may wait; of more, the oldest are dropped"
    )
