"""What is known of every latent of a SAE, as it stands in ``description.json``. Plain data; knows no model."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from probes.card import Digest
from probes.errors import TelltaleError

__all__ = [
    "ControlFigures",
    "Description",
    "DescriptionError",
    "EnrichedIn",
    "LabelScore",
    "LatentDescription",
    "MarkedContext",
    "Token",
    "load_description",
]

FILE_NAME = "description.json"


class DescriptionError(TelltaleError, ValueError):
    """A description cannot be read, or belongs to another SAE."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Token(_Plain):
    """A token by which a latent is told."""

    text: str
    pmi: float = Field(description="log of how much more often the latent is active on it than on any token, nats")
    active: int = Field(description="rows of the token on which it is active, where the label was made")
    rows: int = Field(description="rows of the token there")


class MarkedContext(_Plain):
    """A stretch of text with the activity on each token."""

    quantile: int = Field(description="0: lowest part of the latent's activity")
    tokens: tuple[str, ...]
    activity: tuple[float, ...]
    marked: int = Field(description="the token with the most activity")


class EnrichedIn(_Plain):
    """A labelled set in whose positives a latent is active more often."""

    set: str
    odds_ratio: float
    p: float = Field(description="Fisher's exact test, one-sided")
    q: float = Field(description="the same over all latents (Benjamini and Hochberg)")
    positives: int = Field(description="requests with label 1 in which the latent is active")
    negatives: int = Field(description="requests with label 0 in which it is")


class LabelScore(_Plain):
    """How well a label's tokens foretell in which windows the latent is active."""

    made_on: float = Field(description="balanced accuracy on the half that the label was made on")
    held_out: float = Field(description="on the other half: the detection score")
    active_windows: int = Field(description="held-out windows in which the latent is active")


class LatentDescription(_Plain):
    """One latent."""

    latent: int
    density: float = Field(description="share of the corpus's tokens on which it is active")
    mean_activity: float = Field(description="where it is active")
    largest_activity: float
    label: tuple[str, ...] = Field(description="the label's tokens, the most telling first; empty: none")
    score: LabelScore | None = Field(description="of the label; None: no label, or too few windows")
    named: str | None = Field(default=None, description="label by an external model; nothing of ours vouches for it")
    by_pmi: tuple[Token, ...]
    promoted: tuple[str, ...] = Field(description="next tokens that it speaks for (logit lens)")
    suppressed: tuple[str, ...]
    enriched: tuple[EnrichedIn, ...] = Field(description="with q of at most 0.05")
    contexts: tuple[MarkedContext, ...]

    @property
    def title(self) -> str:
        """What to call it: the name by an external model, else the label's tokens."""
        return self.named or " ".join(repr(text) for text in self.label[:4]) or "no label"


class ControlFigures(_Plain):
    """Held-out detection scores of the features whose label scored best where it was made."""

    name: str
    scored: int = Field(description="features with a label and a score")
    selected: int = Field(description="of them, those with the best score on the half that the labels were made on")
    mean: float | None = Field(description="held-out score of the selected ones; None: there are none")
    median: float | None
    at_least_0_7: int = Field(description="how many of the selected ones have 0.7 or more")
    median_of_all: float | None = Field(description="of all scored ones, selected or not")


class Description(_Plain):
    """All latents of one SAE on one corpus."""

    sae: str
    tensors_digest: Digest
    model: str
    tap: str
    width: int
    corpus: str
    corpus_digest: Digest
    documents: int
    rows: int = Field(description="tokens that were read, sinks left out")
    window: int = Field(description="tokens of a window")
    skip_first: int
    max_norm: float = Field(description="rows with a greater norm are sinks: nothing counts as active on them")
    labelled_sets: tuple[str, ...]
    controls: tuple[ControlFigures, ...] = Field(description="the SAE's own labels first")
    latents: tuple[LatentDescription, ...]
    created_by: str = ""


def load_description(folder: Path) -> Description:
    """What ``telltale sae describe`` wrote.

    Args:
        folder: or the JSON file itself.
    Raises:
        DescriptionError: the file is missing, damaged or of another form.
    """
    path = folder / FILE_NAME if folder.is_dir() else folder
    try:
        return Description.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DescriptionError(
            f"{path}: cannot be read ({error.strerror}). Name the folder that `telltale sae describe` wrote."
        ) from error
    except ValidationError as error:
        raise DescriptionError(
            f"{path}: no description of this version ({error.error_count()} fields are wrong). Write it again with "
            "`telltale sae describe`."
        ) from error
