"""What all parts of the policy file's schema share: strictness, and how names look."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$", description="lower case, digits, '-' and '_'")]
DetectorName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="lower case, digits and '_'")]


class Strict(BaseModel):
    """A part of the policy file: it cannot be changed, and every key must be known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
