"""The command line of ``telltale sae`` for what latents stand for. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["sae_features_app"]

sae_features_app = typer.Typer(no_args_is_help=True)
_Sae = Annotated[Path, typer.Argument(help="The .safetensors file of a SAE, or builtin:PACK/NAME.", show_default=False)]
_Model = Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")]
_Seed = Annotated[int, typer.Option(min=0, help="Of every draw.")]


@sae_features_app.command()
def describe(
    sae: _Sae,
    *,
    corpus: Annotated[
        list[Path],
        typer.Option(
            help="Texts (.jsonl, may be repeated), or the file that it was trained by (.yaml).", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for pages and JSON.", show_default=False)],
    labelled: Annotated[
        list[str] | None,
        typer.Option(help="Set with labels 0 and 1, as for find; may be repeated: which latents are its own?"),
    ] = None,
    text_format: Annotated[str, typer.Option("--format", help="What the labelled sets are: chat or raw.")] = "chat",
    max_tokens: Annotated[int, typer.Option(min=1000, help="Of the corpus that are read.")] = 200_000,
    labeller: Annotated[
        str | None, typer.Option(help="An OpenAI API (http://host/v1) whose model names latents.")
    ] = None,
    labeller_model: Annotated[str | None, typer.Option(help="What that server calls the model.")] = None,
    labeller_latents: Annotated[int, typer.Option(min=1, help="How many it is asked about, the best first.")] = 50,
    model: _Model = None,
    seed: _Seed = 0,
) -> None:
    """Say of each latent where it is active and what it speaks for, with tested labels; pages to browse."""
    from serving.commands.sae_features import DescribeOptions
    from serving.commands.sae_features import describe as run

    run(
        sae,
        DescribeOptions(
            corpus=corpus,
            out=out,
            labelled=labelled or [],
            text_format=text_format,
            max_tokens=max_tokens,
            labeller=labeller,
            labeller_model=labeller_model,
            labeller_latents=labeller_latents,
            model=model,
            seed=seed,
        ),
    )


@sae_features_app.command()
def find(
    sae: _Sae,
    *,
    data: Annotated[
        str,
        typer.Option(help="Set with labels 0 and 1 (.jsonl), or a source such as code_snippets.", show_default=False),
    ],
    text_format: Annotated[str, typer.Option("--format", help="What the set is: chat or raw.")] = "chat",
    sizes: Annotated[str, typer.Option(help="Numbers of latents of the sparse probes.")] = "1,2,4,8,16,32",
    permutations: Annotated[int, typer.Option(min=99, help="Of the labels.")] = 1000,
    out: Annotated[Path | None, typer.Option("--out", help="A JSON file for the table too.")] = None,
    detector: Annotated[str | None, typer.Option(help="Name of a detector to be made of what was found.")] = None,
    detector_size: Annotated[int, typer.Option(min=1, help="Its latents: 1, or one of --sizes.")] = 1,
    detectors: Annotated[Path, typer.Option(help="Folder for the detector.")] = Path("detectors"),
    model: _Model = None,
    seed: _Seed = 0,
) -> None:
    """Find the latents that tell a labelled set apart: selected on one half, measured on the other, with controls."""
    from serving.commands.sae_find import FindOptions
    from serving.commands.sae_find import find as run

    run(
        sae,
        FindOptions(
            data=data,
            text_format=text_format,
            sizes=sizes,
            permutations=permutations,
            out=out,
            detector=detector,
            detector_size=detector_size,
            detectors=detectors,
            model=model,
            seed=seed,
        ),
    )


@sae_features_app.command()
def explain(
    sae: _Sae,
    *,
    text: Annotated[str | None, typer.Option(help="What the user wrote.")] = None,
    request: Annotated[
        Path | None, typer.Option(help="In its place: a file with one request, as in a labelled set, JSONL.")
    ] = None,
    detector: Annotated[
        Path | None, typer.Option(help="That flagged it: its highest tokens are explained.", show_default=False)
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Of the detector: tokens above it are marked.")] = None,
    position: Annotated[
        list[int] | None, typer.Option(help="Of a token, in the place of the highest ones; may be repeated.")
    ] = None,
    description: Annotated[
        Path | None, typer.Option(help="Folder that telltale sae describe wrote, for labels.")
    ] = None,
    text_format: Annotated[str, typer.Option("--format", help="What the request is: chat or raw.")] = "chat",
    tokens: Annotated[int, typer.Option(min=1, help="How many are explained.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="Latents told of each.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", help="A JSON file for it too.")] = None,
    model: _Model = None,
) -> None:
    """Tell which latents were active where a detector flagged a request, and their parts of its score."""
    from serving.commands.sae_explain import ExplainOptions
    from serving.commands.sae_explain import explain as run

    run(
        sae,
        ExplainOptions(
            text=text,
            request=request,
            detector=detector,
            threshold=threshold,
            positions=position or [],
            description=description,
            text_format=text_format,
            tokens=tokens,
            top=top,
            out=out,
            model=model,
        ),
    )


@sae_features_app.command()
def vector(
    sae: _Sae,
    *,
    pairs: Annotated[Path, typer.Option(help='Contrast pairs: {"positive", "negative"} a line.', show_default=False)],
    name: Annotated[str, typer.Option(help="What to call it.", show_default=False)],
    more_is: Annotated[
        str, typer.Option(help="What more of it makes the model: safer, less_safe or neutral.", show_default=False)
    ],
    positive: Annotated[int, typer.Option(min=1, help="Latents that the positive texts have more of.")] = 16,
    negative: Annotated[int, typer.Option(min=0, help="Latents that they have less of.")] = 0,
    max_density: Annotated[float, typer.Option(min=0, max=1, help="Denser latents are dropped.")] = 0.01,
    text_format: Annotated[str, typer.Option("--format", help="What the texts are: chat or raw.")] = "chat",
    description: Annotated[str, typer.Option(help="What it stands for.")] = "",
    model: _Model = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the direction and its card.")] = Path("steers"),
) -> None:
    """Make a steering direction of the latents in which contrast pairs differ (FGAA); judge it by steer eval."""
    from serving.commands.sae_vector import VectorOptions
    from serving.commands.sae_vector import vector as run

    run(
        sae,
        VectorOptions(
            pairs=pairs,
            name=name,
            more_is=more_is,
            positive=positive,
            negative=negative,
            max_density=max_density,
            text_format=text_format,
            description=description,
            model=model,
            out=out,
        ),
    )


@sae_features_app.command()
def edits(
    sae: _Sae,
    *,
    pairs: Annotated[Path, typer.Option(help='Contrast pairs: {"positive", "negative"} a line.', show_default=False)],
    name: Annotated[str, typer.Option(help="What to call them.", show_default=False)],
    more_is: Annotated[
        str,
        typer.Option(help="What the edits make the model: safer, less_safe or neutral.", show_default=False),
    ],
    each: Annotated[int, typer.Option(min=1, help="Latents that are raised, and that are reduced.")] = 2,
    max_dose: Annotated[float, typer.Option(min=0, help="Of each, in median norms.")] = 0.5,
    text_format: Annotated[str, typer.Option("--format", help="What the texts are: chat or raw.")] = "chat",
    model: _Model = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Measure them too: chat prompts, {"prompt": "..."} a line.')
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="With --prompts: system message of the prompt-only baseline.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="With --prompts: what the judge learns from; the pairs if left out.")
    ] = None,
    strengths: Annotated[str, typer.Option(help="With --prompts: what all levels are multiplied by.")] = "0.5,1,2",
    max_tokens: Annotated[int, typer.Option(min=4, help="Of a reply.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Random directions at each strength.")] = 3,
    neutral_lines: Annotated[int, typer.Option(min=1, max=64, help="Lines of ordinary text for KL.")] = 64,
    report: Annotated[Path | None, typer.Option(help="Folder for table and figures.")] = None,
) -> None:
    """Print steers that raise and reduce the latents in which contrast pairs differ (SpARE), for a policy file.

    With --prompts, what they do to replies and what else: beside random directions and a prompt.
    """
    from serving.commands.sae_edits import EditsOptions, EditsTrial
    from serving.commands.sae_edits import edits as run

    run(
        sae,
        EditsOptions(
            pairs=pairs,
            name=name,
            more_is=more_is,
            each=each,
            max_dose=max_dose,
            text_format=text_format,
            model=model,
        ),
        EditsTrial(
            prompts=prompts,
            instruction=instruction,
            examples=examples,
            strengths=strengths,
            max_tokens=max_tokens,
            seeds=seeds,
            neutral_lines=neutral_lines,
            report=report,
        ),
    )
