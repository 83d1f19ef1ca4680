"""What was found, as JSON and as text. Plain data."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field

from probes.card import Digest

__all__ = ["Counts", "Figure", "FoundLatent", "Interval", "SparseProbe", "Table"]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(_Plain):
    """A figure and its 95 % interval over resamples of whole groups."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Counts(_Plain):
    """Requests of a half."""

    positives: int
    negatives: int
    groups: int


class Figure(_Plain):
    """One scorer."""

    name: str
    selected_on: float | None = Field(description="AUROC on the half that it was selected or fitted on: flattered")
    measured: Interval = Field(description="AUROC on the other half")
    minus_raw: Interval | None = Field(description="that minus the raw probe's, on the same resamples; None: no such")


class FoundLatent(_Plain):
    """A latent that alone tells the labels apart."""

    latent: int
    statistic: str = Field(description="max or mean of its activity over a request's tokens")
    selected_on: float
    p: float = Field(description="that the best of all latents does as well under permuted labels")
    measured: Interval


class SparseProbe(_Plain):
    """Logistic regression on the means of some latents' codes: a detector of kind sae_latent with aggregate mean."""

    latents: tuple[int, ...]
    weights: tuple[float, ...] = Field(description="of the codes as they are, standardisation folded in")
    bias: float


class Table(_Plain):
    """What ``telltale sae find`` found."""

    sae: str
    tensors_digest: Digest
    data_digest: Digest
    selected_on: Counts
    measured_on: Counts
    by_group: bool = Field(description="whether no group stands in both halves")
    figures: tuple[Figure, ...]
    latents: tuple[FoundLatent, ...]
    sparse_probes: tuple[SparseProbe, ...]

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"selected on {_told(self.selected_on)}, measured on {_told(self.measured_on)}"
            + ("" if self.by_group else "; some group stands in BOTH halves: the set has too few")
        )
        yield ""
        yield f"{'AUROC':46}{'selected on':>12}  {'measured':24}minus raw"
        for each in self.figures:
            selected = "-" if each.selected_on is None else f"{each.selected_on:.3f}"
            yield f"{each.name:46}{selected:>12}  {each.measured!s:24}{each.minus_raw or '-'!s}"
        yield ""
        yield f"{'latent':>8}  {'by its':8}{'selected on':>12}{'p, all latents':>16}  measured"
        for found in self.latents:
            yield f"{found.latent:8}  {found.statistic:8}{found.selected_on:12.3f}{found.p:16.4f}  {found.measured}"


def _told(counts: Counts) -> str:
    return f"{counts.positives} + {counts.negatives} requests in {counts.groups} groups"
