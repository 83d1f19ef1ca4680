"""``telltale sae describe``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import serving
from probes.card import Format
from probes.errors import TelltaleError, did_you_mean
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say

if TYPE_CHECKING:
    from probes.fit.rows.example import Example
    from probes.sae.describe.corpus import Corpus
    from probes.sae.describe.description import ControlFigures
    from probes.sae.describe.labeller import Labeller

__all__ = ["DescribeOptions", "FeaturesError", "describe", "format_of", "labelled_rows", "model_of"]


class FeaturesError(TelltaleError, ValueError):
    """The options of a command do not go together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeOptions:
    """As on the command line."""

    corpus: Sequence[Path]
    out: Path
    labelled: Sequence[str]
    text_format: str
    max_tokens: int
    labeller: str | None
    labeller_model: str | None
    labeller_latents: int
    model: str | None
    seed: int


def describe(sae: Path, options: DescribeOptions) -> None:
    """Describe all latents, and write pages and JSON.

    Raises:
        probes.errors.TelltaleError: the SAE, the texts or the model are not usable.
    """
    from probes.packs.saes import open_sae
    from probes.sae.describe.browser import write_browser
    from probes.sae.describe.describe import Describing
    from probes.sae.describe.describe import describe as run

    labeller = _labeller(options)
    folder, model_id = model_of(options.model)
    file = open_sae(sae)
    found = run(
        file,
        _corpus(options, folder),
        {Path(each).stem: labelled_rows(each, seed=options.seed) for each in options.labelled},
        Describing(
            model_dir=folder,
            model_id=model_id,
            corpus_name=", ".join(path.name for path in options.corpus),
            progress=say,
            created_by=f"telltale {serving.__version__}",
            text_format=format_of(options.text_format),
            seed=options.seed,
            labeller=labeller,
            named=options.labeller_latents,
        ),
    )
    index = write_browser(options.out, found)
    for line in _lines(found.controls):
        typer.echo(line)
    say(f"wrote {index}")


def _corpus(options: DescribeOptions, folder: Path) -> Corpus:
    from probes.cachedir import user_cache_dir
    from probes.fit.rows.wheels import WheelStore
    from probes.fit.sources.jsonl import read_jsonl
    from probes.sae.describe.reading import text_corpus, training_corpus
    from probes.sae.train.config import read_config

    configs = [path for path in options.corpus if path.suffix in {".yaml", ".yml"}]
    if not configs:
        texts = [row for path in options.corpus for row in read_jsonl(path, label=0)]
        return text_corpus(folder, texts, max_tokens=options.max_tokens)
    if len(options.corpus) > 1:
        raise FeaturesError("--corpus: give either texts (.jsonl) or one file of telltale sae train (.yaml).")
    wheels = WheelStore(folder=user_cache_dir() / "wheels", progress=say)
    return training_corpus(folder, read_config(configs[0]), wheels, max_tokens=options.max_tokens)


def labelled_rows(name: str, *, seed: int) -> list[Example]:
    """A labelled set: a file of JSON lines, or one of our own sources by its kind, such as ``code_snippets``.

    Args:
        name: path ending in .jsonl, or kind.
        seed: of what a source draws.
    Raises:
        probes.errors.TelltaleError: there is no such file or kind, or it cannot be read.
    """
    from probes.cachedir import user_cache_dir
    from probes.fit.rows.example import without_dropped, without_duplicates
    from probes.fit.rows.wheels import WheelStore
    from probes.fit.sources import SourceContext, parse_source
    from probes.fit.sources.jsonl import read_jsonl

    if Path(name).suffix == ".jsonl":
        return read_jsonl(Path(name))
    wheels = WheelStore(folder=user_cache_dir() / "wheels", progress=say)
    source = parse_source({"kind": name})
    loaded = source.load(SourceContext(wheels=wheels, folder=Path(), seed=seed))
    return without_duplicates(without_dropped(loaded), seen=set())


def model_of(model: str | None) -> tuple[Path, str]:
    """Folder and name of the model that was asked for; the embedded one if none was."""
    chosen = model or DEFAULT_MODEL
    return embedded_folder(chosen) or Path(chosen), chosen


def format_of(name: str) -> Format:
    """``chat`` or ``raw``.

    Raises:
        FeaturesError: it is neither.
    """
    known = [each.value for each in Format]
    if name not in known:
        raise FeaturesError(f"--format is {name!r}. {did_you_mean(name, known)}")
    return Format(name)


def _labeller(options: DescribeOptions) -> Labeller | None:
    from probes.sae.describe.labeller import OpenAiLabeller

    if options.labeller is None and options.labeller_model is None:
        return None
    if options.labeller is None or options.labeller_model is None:
        raise FeaturesError("--labeller and --labeller-model stand together: where to ask, and which model.")
    key = os.environ.get("OPENAI_API_KEY", "none")
    return OpenAiLabeller(options.labeller, options.labeller_model, api_key=key)


def _lines(controls: Sequence[ControlFigures]) -> list[str]:
    lines = [f"{'held-out detection score':26}{'scored':>8}{'selected':>10}{'median':>8}{'>= 0.7':>8}{'all':>8}"]
    for each in controls:
        median, every = ("-" if value is None else f"{value:.3f}" for value in (each.median, each.median_of_all))
        lines.append(f"{each.name:26}{each.scored:8}{each.selected:10}{median:>8}{each.at_least_0_7:8}{every:>8}")
    return lines
