"""Where a model is read: a site inside a decoder layer. Knows names and shapes, no engine and no tensor library."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from probes.errors import TelltaleError, did_you_mean

_TAP = re.compile(r"(?P<site>[a-z_]+)\.(?P<layer>[0-9]+)")


class TapError(TelltaleError, ValueError):
    """A tap's name or layer cannot be used."""


class Site(StrEnum):
    """A place inside a decoder layer whose value can be read."""

    RESID_POST = "resid_post"
    """The residual stream after the layer: transformers' ``hidden_states[layer + 1]``, before any final norm."""
    ATTN_OUT = "attn_out"
    """What the layer's attention module returns: after its output projection and the sum over tensor-parallel ranks,
    before any norm or multiplier that stands between it and the stream."""
    MLP_OUT = "mlp_out"
    """What the layer's MLP or mixture-of-experts module returns, in the same sense."""


@dataclass(frozen=True, slots=True, order=True)
class Tap:
    """One site at one layer; layer 0 is the first decoder layer."""

    layer: int
    site: Site = Site.RESID_POST

    def __str__(self) -> str:
        return f"{self.site.value}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Read ``resid_post.15``, ``attn_out.3`` or ``mlp_out.3``.

        Raises:
            TapError: the text is not ``<site>.<layer>`` with a known site.
        """
        match = _TAP.fullmatch(text)
        known = [site.value for site in Site]
        if match is None:
            raise TapError(f"tap {text!r} is not of the form <site>.<layer>, e.g. 'resid_post.15'. Sites: {known}")
        site = match["site"]
        if site not in known:
            raise TapError(f"tap {text!r} names the site {site!r}. {did_you_mean(site, known)}")
        return cls(layer=int(match["layer"]), site=Site(site))
