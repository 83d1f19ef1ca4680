"""``telltale sae import``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import serving
from probes.errors import TelltaleError, did_you_mean
from probes.sae.file import Precision, SaeFile
from probes.taps import Tap
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say


class SaeImportError(TelltaleError, ValueError):
    """An option says nothing that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeImportOptions:
    """What the command line says; see its help."""

    name: str
    model: str | None
    tap: str | None
    input_factor: float | None
    layout: str | None
    precision: str
    licence: str
    corpus: str
    description: str
    force: bool
    out: Path


def sae_import(path: Path, options: SaeImportOptions) -> None:
    """Read a sparse autoencoder of another library, check it on the model and write it in our form.

    Raises:
        probes.errors.TelltaleError: the files, the model or an option is not usable.
    """
    from probes.sae.importing import Importing, import_sae
    from probes.sae.layouts import Stated

    words = [word.value for word in Precision]
    if options.precision not in words:
        raise SaeImportError(f"--precision is {options.precision!r}. {did_you_mean(options.precision, words)}")
    chosen = options.model or DEFAULT_MODEL
    made = import_sae(
        Importing(
            path=path,
            model_dir=embedded_folder(chosen) or Path(chosen),
            model_id=chosen,
            name=options.name,
            out=options.out,
            stated=Stated(Tap.parse(options.tap) if options.tap else None, options.input_factor),
            layout=options.layout,
            precision=Precision(options.precision),
            licence=options.licence,
            corpus=options.corpus,
            description=options.description,
            force=options.force,
            created_by=f"telltale {serving.__version__}",
            progress=say,
        )
    )
    _show(made)


def _show(made: SaeFile) -> None:
    card = made.card
    figures = ", ".join(f"{name} {value}" for name, value in card.evaluation["ordinary_text"].items())
    say(f"wrote {made.path}: {card.width} latents at {card.tap} of {card.model.id}; on ordinary text: {figures}")
    if card.conversion:
        found = card.conversion
        say(
            f"it keeps the {found['rank']} largest latents of a row; a threshold of {found['threshold']:.4g} stands "
            f"for that: the active sets share {found['jaccard']:.0%} in the mean, {found['l0']:.1f} latents are active "
            f"(spread {found['l0_spread']:.1f})"
        )
