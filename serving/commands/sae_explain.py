"""``telltale sae explain``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from serving.commands.model import say
from serving.commands.sae_features import FeaturesError, format_of, model_of

if TYPE_CHECKING:
    from probes.fit.rows.example import Example

__all__ = ["ExplainOptions", "explain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions:
    """As on the command line."""

    text: str | None
    request: Path | None
    detector: Path | None
    threshold: float | None
    positions: Sequence[int]
    description: Path | None
    text_format: str
    tokens: int
    top: int
    out: Path | None
    model: str | None


def explain(sae: Path, options: ExplainOptions) -> None:
    """Explain one request, and print it; as JSON too where a file is named.

    Raises:
        probes.errors.TelltaleError: the SAE, the request, the detector or the model are not usable.
    """
    from probes.artifact import Artifact
    from probes.packs.saes import open_sae
    from probes.sae.describe.description import load_description
    from probes.sae.explain import Explaining
    from probes.sae.explain import explain as run

    folder, model_id = model_of(options.model)
    found = run(
        open_sae(sae),
        _request(options),
        Explaining(
            model_dir=folder,
            model_id=model_id,
            progress=say,
            text_format=format_of(options.text_format),
            tokens=options.tokens,
            top=options.top,
        ),
        detector=None if options.detector is None else Artifact.load(options.detector),
        threshold=options.threshold,
        positions=options.positions,
        description=None if options.description is None else load_description(options.description),
    )
    for line in found.lines():
        typer.echo(line)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        say(f"wrote {options.out}")


def _request(options: ExplainOptions) -> Example:
    from probes.fit.rows.example import Example
    from probes.fit.sources.jsonl import read_jsonl

    if (options.text is None) == (options.request is None):
        raise FeaturesError("give either --text or --request: what is to be explained.")
    if options.request is None:
        return Example(text=options.text or "", label=0, source="command line", group="command line")
    rows = read_jsonl(options.request, label=0)
    if len(rows) != 1:
        raise FeaturesError(f"{options.request}: {len(rows)} requests; one is explained at a time.")
    return rows[0]
