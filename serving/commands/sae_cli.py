"""``telltale sae``: sparse autoencoders and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.builtin import DEFAULT_MODEL

sae_app = typer.Typer(help="Sparse autoencoders: import them, and watch their latents.", no_args_is_help=True)
_Model = Annotated[str | None, typer.Option("--model", help=f"Model; {DEFAULT_MODEL} if left out.")]


@sae_app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="Folder or file of another library.", show_default=False)],
    *,
    name: Annotated[str, typer.Option(help="What to call it.", show_default=False)],
    model: _Model = None,
    tap: Annotated[str | None, typer.Option(help="Where it reads, if its files do not say: resid_post.15.")] = None,
    input_factor: Annotated[
        float | None, typer.Option(min=1e-9, help="What its inputs are multiplied by, if its files do not say.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Which library wrote it; found out if left out.")] = None,
    precision: Annotated[str, typer.Option(help="Of the matrices: float32 or float16.")] = "float32",
    licence: Annotated[str, typer.Option(help="Of the weights.")] = "not stated",
    corpus: Annotated[str, typer.Option(help="The text that it was trained on.")] = "not stated",
    description: Annotated[str, typer.Option(help="For the card.")] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Take it though its model has another name, or it explains nothing.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for the file and its card.")] = Path("saes"),
) -> None:
    """Bring a SAE of SAELens, Gemma Scope, sparsify or dictionary_learning into our form, checked on the model."""
    from serving.commands.sae_import import SaeImportOptions
    from serving.commands.sae_import import sae_import as run

    run(
        path,
        SaeImportOptions(
            name=name,
            model=model,
            tap=tap,
            input_factor=input_factor,
            layout=layout,
            precision=precision,
            licence=licence,
            corpus=corpus,
            description=description,
            force=force,
            out=out,
        ),
    )


@sae_app.command()
def detector(
    sae: Annotated[
        Path, typer.Argument(help="The .safetensors file of a SAE, or builtin:PACK/NAME.", show_default=False)
    ],
    *,
    latents: Annotated[str, typer.Option(help="Numbers of the latents: 1742,88.", show_default=False)],
    name: Annotated[str, typer.Option(help="What to call it.", show_default=False)],
    combine: Annotated[
        str | None, typer.Option(help="What is made of their codes: max, sum, weighted; single for one.")
    ] = None,
    weights: Annotated[str, typer.Option(help="With weighted, one for each latent: 0.7,-0.2.")] = "",
    intercept: Annotated[float, typer.Option(help="Added, with weighted.")] = 0.0,
    description: Annotated[str, typer.Option(help="For the card.")] = "",
    out: Annotated[Path, typer.Option("--out", help="Folder for the detector and its card.")] = Path("detectors"),
) -> None:
    """Cut a detector out of a SAE: a few of its latents, each at the price of a linear probe."""
    from serving.commands.sae_detector import SaeDetectorOptions
    from serving.commands.sae_detector import sae_detector as run

    run(
        sae,
        SaeDetectorOptions(
            latents=latents,
            name=name,
            combine=combine,
            weights=weights,
            intercept=intercept,
            description=description,
            out=out,
        ),
    )
