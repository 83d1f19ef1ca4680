"""Two-sided edits of latents, chosen by contrast pairs as SpARE does (Zhao et al. 2024, arXiv:2410.15999).

SpARE ranks latents by their mutual information with the behaviour, takes from those of the unwanted one what they
usually hold, and raises those of the wanted one to what they usually hold. Each of these edits is a rank-one update, so
each becomes a steer of its own (``reduce_latent``, ``raise_latent``); as steers at one tap are parallel, together they
are the decoded change of the codes. What differs from the paper: activity is that of every row in which a latent is
active, not of the last one alone; there is no factor above 1 (``edit degree``); ``raise_latent`` says what becomes of
rows between 0 and a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.card import Format
from probes.fit.steer.pairs import PairError, read_pairs
from probes.sae.describe.codes import SINK_FACTOR, Codes, read_codes
from probes.sae.describe.reading import open_sae_reader, read_requests
from probes.sae.file import SaeFile
from probes.steering.artifact import Safety

__all__ = ["Edit", "EditKind", "choose_edits", "edits_of_pairs"]

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


_REVERSED = {
    Safety.SAFER: Safety.LESS_SAFE,
    Safety.LESS_SAFE: Safety.SAFER,
    Safety.NEUTRAL: Safety.NEUTRAL,
}


class EditKind(StrEnum):
    """Operators by which latents are edited."""

    RAISE = "raise_latent"
    REDUCE = "reduce_latent"


@dataclass(frozen=True, slots=True)
class Edit:
    """One latent and what is done to it.

    Attributes:
        kind: operator.
        latent: number.
        level: floor of ``raise_latent``, or what ``reduce_latent`` takes: the mean activity on rows of the texts that
            have more of the latent, where it is active.
        information: mutual information between its being active in a text and the text's side, in nats.
    """

    kind: EditKind
    latent: int
    level: float
    information: float

    def as_yaml(self, name: str, sae: Path, *, more_is: Safety, max_dose: float) -> str:
        """An entry of a policy file's ``steers``.

        Args:
            name: of the whole edit; the latent's number is added.
            sae: the file.
            more_is: what more of the wanted behaviour makes the model; more of the unwanted one makes it the reverse.
            max_dose: in median norms.
        """
        parameter = "floor" if self.kind is EditKind.RAISE else "by"
        said = more_is if self.kind is EditKind.RAISE else _REVERSED[more_is]
        return (
            f"  - {{name: {name}_{self.latent}, sae: {sae}, latent: {self.latent}, op: {self.kind.value}, "
            f"{parameter}: {self.level:.4g}, more_is: {said.value}, max_dose: {max_dose:g}}}"
        )


def edits_of_pairs(
    file: SaeFile,
    model_dir: Path,
    pairs: Path,
    *,
    model_id: str,
    text_format: Format,
    each: int,
    progress: Callable[[str], None],
) -> list[Edit]:
    """Choose edits by contrast pairs: towards the positive texts.

    Args:
        file: of the SAE.
        model_dir: folder of its model, in transformers' layout.
        pairs: as ``read_pairs`` takes them.
        model_id: what people call the model.
        text_format: whether texts are user messages or stand as they are.
        each: latents that are raised, and latents that are reduced, at most.
        progress: told what is being done.
    Raises:
        PairError: the pairs cannot be read, or no latent tells their sides apart.
        probes.artifact.ArtifactError: the SAE belongs to another model.
    """
    texts = [text for pair in read_pairs(pairs) for text in (pair.positive, pair.negative)]
    reader = open_sae_reader(file, model_dir, model_id=model_id, progress=progress)
    requests = read_requests(reader, texts, text_format)
    median, skip_first = file.card.median_norm, file.card.skip_first
    limit = np.inf if median is None else SINK_FACTOR * median
    codes = read_codes([file.sae()], reader, requests, skip_first=skip_first, label="pairs", max_norm=limit)[0]
    return choose_edits(codes, np.array([text.label for text in texts], dtype=np.int64), each=each)


def choose_edits(codes: Codes, labels: Int64, *, each: int) -> list[Edit]:
    """The latents that say most of the side, those that are raised first.

    Args:
        codes: of the texts.
        labels: (texts,), 1 for the wanted side.
        each: latents of each kind, at most.
    Raises:
        PairError: no latent tells the sides apart.
    """
    active = codes.maxima() > 0
    information = _information(active, labels)
    more = active[labels == 1].mean(axis=0) - active[labels == 0].mean(axis=0)
    side = np.repeat(labels, np.diff(codes.offsets))
    found = []
    for kind, label, sign in ((EditKind.RAISE, 1, 1.0), (EditKind.REDUCE, 0, -1.0)):
        of_sign = np.where(sign * more > 0, information, 0.0)
        for latent in np.argsort(-of_sign, kind="stable")[:each]:
            if of_sign[latent] > 0:
                values = codes.matrix[side == label][:, [int(latent)]].data
                found.append(Edit(kind, int(latent), float(values.mean()), float(of_sign[latent])))
    if not found:
        raise PairError("no latent is active more often on one side of the pairs than on the other. Take other pairs.")
    return found


def _information(active: npt.NDArray[np.bool_], labels: Int64) -> Float64:
    """(width,) nats."""
    total = np.zeros(active.shape[1])
    for is_active in (True, False):
        share = (active == is_active).mean(axis=0)
        for label in (1, 0):
            joint = ((active == is_active) & (labels == label)[:, None]).mean(axis=0)
            independent = share * float((labels == label).mean())
            total += np.where(
                joint > 0, joint * np.log(np.where(joint > 0, joint, 1.0) / np.maximum(independent, 1e-300)), 0.0
            )
    return total
