"""``telltale sae find``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import serving
from serving.commands.model import say
from serving.commands.sae_features import FeaturesError, format_of, labelled_rows, model_of

if TYPE_CHECKING:
    from probes.sae.file import SaeFile
    from probes.sae.find.table import Table

__all__ = ["FindOptions", "find"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FindOptions:
    """As on the command line."""

    data: str
    text_format: str
    sizes: str
    permutations: int
    out: Path | None
    detector: str | None
    detector_size: int
    detectors: Path
    model: str | None
    seed: int


def find(sae: Path, options: FindOptions) -> None:
    """Find latents, and print the table; as JSON, and as a detector, where one is named.

    Raises:
        probes.errors.TelltaleError: the SAE, the set or the model are not usable.
    """
    from probes.packs.saes import open_sae
    from probes.sae.find.find import Finding
    from probes.sae.find.find import find as run

    sizes = _numbers(options.sizes)
    if options.detector is not None and options.detector_size not in {1, *sizes}:
        raise FeaturesError(f"--detector-size is {options.detector_size}; it must be 1 or one of --sizes {sizes}.")
    folder, model_id = model_of(options.model)
    file = open_sae(sae)
    table = run(
        file,
        labelled_rows(options.data, seed=options.seed),
        Finding(
            model_dir=folder,
            model_id=model_id,
            progress=say,
            text_format=format_of(options.text_format),
            sizes=sizes,
            permutations=options.permutations,
            seed=options.seed,
        ),
    )
    for line in table.lines():
        typer.echo(line)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table.model_dump_json(indent=2) + "\n", encoding="utf-8")
        say(f"wrote {options.out}")
    if options.detector is not None:
        _write_detector(file, table, options, options.detector)


def _write_detector(file: SaeFile, table: Table, options: FindOptions, name: str) -> None:
    from pydantic import ValidationError

    from probes.artifact import save_artifact
    from probes.sae.find.detector import found_detector

    try:
        found = found_detector(
            file,
            table,
            name=name,
            size=options.detector_size,
            path=options.detectors / f"{name}.safetensors",
            created_by=f"telltale {serving.__version__}",
        )
    except ValidationError as error:
        raise FeaturesError(
            f"--detector is {name!r}: a name has lower-case letters, digits and '_', and begins with a letter."
        ) from error
    made = save_artifact(found.artifact.path, found.artifact.card, found.artifact.tensors)
    say(f"wrote {made.path}; calibrate it: telltale calibrate {made.path} --aggregate {found.aggregate} --benign ...")


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise FeaturesError(f"--sizes is {text!r}; whole numbers above 0 with commas are needed: 1,2,4,8.")
    return tuple(sorted({int(part) for part in parts}))
