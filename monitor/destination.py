"""Where a rule that escalates or routes turns to, as it stands in the policy file. Knows no engine and no HTTP."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from monitor.strict import Strict
from monitor.when import Condition

TEXT_FIELD = "{text}"
"""Stands in a judge's prompt where the text goes."""
_LOCAL_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})
_OPINIONS = ("probe", "judge", "classifier")
_MODELS = ("model", "upstream")


def _safe_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"https", "http"} or not parts.hostname:
        raise ValueError(f"is {url!r}; it is an address that begins with https://")
    if parts.scheme == "http" and parts.hostname not in _LOCAL_HOSTS:
        raise ValueError(
            f"is {url!r}, which would send what people write unencrypted. Use https://; http:// is for this machine "
            "alone (127.0.0.1)"
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a password; name the environment variable that holds the key in 'key_env' instead")
    if parts.query or parts.fragment:
        raise ValueError(f"is {url!r}; leave out what follows '?' or '#'")
    return url.rstrip("/")


Url = Annotated[str, Field(max_length=2048), AfterValidator(_safe_url)]


class Destination(Strict):
    """Who gives a second opinion (``probe``, ``judge``, ``classifier``), or who answers (``model``, ``upstream``)."""

    probe: Condition | None = Field(
        default=None, description="a second condition over detectors of this file; no further call of the model"
    )
    judge: str | None = Field(
        default=None,
        min_length=1,
        max_length=16384,
        description=f"a question to the served model, with {TEXT_FIELD} where the text goes; it is answered yes or no, "
        "and yes flags the text",
    )
    classifier: Url | None = Field(
        default=None, description="address that gets {text, detector, score} by POST and answers {flagged: true}"
    )
    model: str | None = Field(default=None, min_length=1, max_length=256, description="name of the model that answers")
    upstream: Url | None = Field(
        default=None, description="base address of another server with OpenAI's API, e.g. https://host/v1"
    )
    key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$",
        description="environment variable with the API key of the 'classifier' or the 'upstream'",
    )

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        opinions = [key for key in _OPINIONS if getattr(self, key) is not None]
        models = [key for key in _MODELS if getattr(self, key) is not None]
        if len(opinions) + bool(models) != 1:
            raise ValueError(
                "'to' names one of 'probe', 'judge' and 'classifier' (escalate), or a 'model', an 'upstream' or both "
                "(route)"
            )
        if self.key_env is not None and self.classifier is None and self.upstream is None:
            raise ValueError("'key_env' holds the key of a 'classifier' or an 'upstream'; there is none here")
        if self.judge is not None and self.judge.count(TEXT_FIELD) != 1:
            raise ValueError(f"'judge' has {TEXT_FIELD} exactly once: that is where the text goes")
        return self

    @property
    def is_opinion(self) -> bool:
        """Whether it judges a text; else it answers requests."""
        return self.model is None and self.upstream is None
