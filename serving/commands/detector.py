"""``telltale detector``: detectors that are made without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import serving
from probes.speaker import Speaker
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say

if TYPE_CHECKING:
    from probes.fit.training.making import Making

detector_app = typer.Typer(help="Make detectors without a recipe.", no_args_is_help=True)
_Layer = Annotated[int, typer.Option(min=0, help="Layer after which it reads.", show_default=False)]
_Name = Annotated[str, typer.Option(help="What to call it.", show_default=False)]
_Model = Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")]
_Out = Annotated[Path, typer.Option("--out", help="Folder for the artifact and its card.")]
_NEXT = "calibrate it before a rule asks for a rate of false alarms (telltale calibrate)"


@detector_app.command()
def novelty(
    requests: Annotated[Path, typer.Argument(help='Ordinary requests: {"prompt": "..."} a line.', show_default=False)],
    *,
    layer: _Layer,
    name: _Name,
    components: Annotated[int, typer.Option(min=1, help="Principal components that are told apart.")] = 32,
    model: _Model = None,
    out: _Out = Path("detectors"),
) -> None:
    """Tell requests that are unlike your ordinary ones: another language, code, noise. Never blocks alone."""
    from probes.card import Format
    from probes.fit.sources.jsonl import read_jsonl
    from probes.fit.training.unlabelled import make_novelty

    rows = read_jsonl(requests, label=0)
    about = f"unlike the {len(rows)} requests of {requests.name}"
    making = _making(about, layer=layer, name=name, model=model, out=out)
    made = make_novelty(making, rows, text_formats=tuple(Format), components=components)
    say(f"wrote {made.path}; {_NEXT}")


@detector_app.command()
def lens(
    *,
    tokens: Annotated[list[str], typer.Option("--token", help="Text of one token; may be repeated.")],
    contrast: Annotated[list[str], typer.Option("--contrast", help="One that they are weighed against; likewise.")],
    layer: _Layer,
    name: _Name,
    model: _Model = None,
    out: _Out = Path("detectors"),
) -> None:
    """Tell when a layer speaks for some next tokens rather than others."""
    from probes.fit.training.unlabelled import make_lens

    about = f"{', '.join(map(repr, tokens))} rather than {', '.join(map(repr, contrast))}"
    making = _making(about, layer=layer, name=name, model=model, out=out)
    say(f"wrote {make_lens(making, tokens=tokens, contrast=contrast).path}; {_NEXT}")


@detector_app.command()
def drift(
    rows: Annotated[
        Path,
        typer.Argument(
            help='Conversations: {"messages": [..., {"role": "tool", ...}], "label": 0 or 1} a line.',
            show_default=False,
        ),
    ],
    *,
    layer: _Layer,
    name: _Name,
    segments: Annotated[
        list[Speaker], typer.Option("--segment", help="Whose texts nobody vouches for; may be repeated.")
    ] = [Speaker.TOOL],  # noqa: B006 - typer copies it
    model: _Model = None,
    out: _Out = Path("detectors"),
) -> None:
    """Tell texts that take the model off its task, such as instructions in a tool's answer (label 1)."""
    from probes.fit.fitters.logistic import Logistic
    from probes.fit.sources.jsonl import read_jsonl
    from probes.fit.training.drift import make_drift

    about = f"text of {', '.join(segments)} that takes the model off its task"
    making = _making(about, layer=layer, name=name, model=model, out=out)
    fitter = Logistic(inverse_penalty=0.01)
    made = make_drift(making, read_jsonl(rows), segments=tuple(dict.fromkeys(segments)), fitter=fitter)
    say(f"wrote {made.path}; {_NEXT} --aggregate delta")


def _making(description: str, *, layer: int, name: str, model: str | None, out: Path) -> Making:
    from probes.fit.training.making import Making

    chosen = model or DEFAULT_MODEL
    return Making(
        model_dir=embedded_folder(chosen) or Path(chosen),
        model_id=chosen,
        layer=layer,
        name=name,
        description=description,
        out=out,
        created_by=f"telltale {serving.__version__}",
        progress=say,
    )
