"""A description as web pages that need nothing else: no server, no script from elsewhere, every text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from probes.sae.describe.description import FILE_NAME, Description, LatentDescription, MarkedContext

__all__ = ["write_browser"]

_PER_PAGE = 64
_PAGES = "latents"
_SPACES = {"\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"}
"""How characters are shown that cannot be seen."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A token of a context; ``shade`` is the share of the context's largest activity, 0 to 1."""

    text: str
    shade: float
    activity: float
    marked: bool


def write_browser(folder: Path, description: Description) -> Path:
    """Write ``index.html``, a page for each 64 latents, and ``description.json``.

    The index lists every latent, to be searched and sorted by a script that stands in the page; all work from a
    folder. The same description gives the same pages.

    Args:
        folder: made if it is missing; pages of an earlier description in it are replaced.
        description: of the SAE.
    Returns: path of the index.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": _shown, "pieces": _pieces}
    pages = list(_chunks(description.latents))
    (folder / _PAGES).mkdir(parents=True, exist_ok=True)
    for old in (folder / _PAGES).glob("page-*.html"):
        old.unlink()
    page = environment.get_template("latents_page.html")
    for number, latents in enumerate(pages):
        (folder / _PAGES / _page_name(number)).write_text(
            page.render(
                description=description,
                latents=latents,
                previous=_page_name(number - 1) if number else None,
                next=_page_name(number + 1) if number + 1 < len(pages) else None,
            ),
            encoding="utf-8",
        )
    index = folder / "index.html"
    rows = [(latent, f"{_PAGES}/{_page_name(place // _PER_PAGE)}") for place, latent in enumerate(description.latents)]
    index.write_text(
        environment.get_template("index_page.html").render(description=description, rows=rows), encoding="utf-8"
    )
    (folder / FILE_NAME).write_text(description.model_dump_json(), encoding="utf-8")
    return index


def _chunks(latents: Sequence[LatentDescription]) -> Iterator[Sequence[LatentDescription]]:
    for start in range(0, len(latents), _PER_PAGE):
        yield latents[start : start + _PER_PAGE]


def _page_name(number: int) -> str:
    return f"page-{number:04d}.html"


def _shown(text: str) -> str:
    return "".join(_SPACES.get(character, character) for character in text)


def _pieces(context: MarkedContext) -> list[_Piece]:
    largest = max(context.activity, default=0.0) or 1.0
    return [
        _Piece(text, round(max(value, 0.0) / largest, 2), value, place == context.marked)
        for place, (text, value) in enumerate(zip(context.tokens, context.activity, strict=True))
    ]
