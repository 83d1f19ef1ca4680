"""A detector of what was found: the best latent, or a sparse probe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from probes.artifact import Artifact
from probes.sae.combine import Combine
from probes.sae.file import SaeFile
from probes.sae.find.halves import FindError
from probes.sae.find.table import Table
from probes.sae.latent_artifact import latent_artifact

__all__ = ["FoundDetector", "found_detector"]


@dataclass(frozen=True, slots=True)
class FoundDetector:
    """A detector without a calibration.

    Attributes:
        artifact: to be saved.
        aggregate: of its scores, with which the request's number is the one that was measured.
    """

    artifact: Artifact
    aggregate: str


def found_detector(
    file: SaeFile, table: Table, *, name: str, size: int, path: Path, created_by: str = ""
) -> FoundDetector:
    """The detector whose figures the table tells; they are put onto its card.

    The best latent by its maximum goes with the aggregate ``max``. A sparse probe was fitted on means of codes, so its
    score of a request is the mean of its scores of the tokens.

    Args:
        file: of the SAE that the table is of.
        table: what was found.
        name: of the detector.
        size: 1 for the best single latent; else the number of latents of a sparse probe of the table.
        path: where it will be saved.
        created_by: version that makes it.
    Raises:
        FindError: the table is of another SAE, or has no sparse probe of that size.
    """
    if table.tensors_digest != file.card.tensors_digest:
        raise FindError(f"the table is of {table.sae!r} with other weights than {file.path}. Find them again.")
    if size == 1:
        best = next(latent for latent in table.latents if latent.statistic == "max")
        made = latent_artifact(file, [best.latent], name=name, combine=Combine.SINGLE, path=path, created_by=created_by)
        figures = {"selected_on": best.selected_on, "p": best.p, "measured": best.measured.model_dump()}
        aggregate = "max"
    else:
        probe = next((probe for probe in table.sparse_probes if len(probe.latents) == size), None)
        if probe is None:
            known = ", ".join(str(len(probe.latents)) for probe in table.sparse_probes)
            raise FindError(f"the table has no probe of {size} latents; it has {known}.")
        made = latent_artifact(
            file,
            list(probe.latents),
            name=name,
            combine=Combine.WEIGHTED,
            weights=list(probe.weights),
            intercept=probe.bias,
            path=path,
            created_by=created_by,
        )
        of_size = next(figure for figure in table.figures if figure.name == f"{size} latents, logistic regression")
        figures = of_size.model_dump(mode="json")
        aggregate = "mean"
    evaluation = {"find": {**figures, "data_digest": table.data_digest, "aggregate": aggregate}}
    card = made.card.model_copy(update={"evaluation": evaluation})
    return FoundDetector(Artifact(path=made.path, card=card, tensors=made.tensors), aggregate)
