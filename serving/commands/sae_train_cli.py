"""The command line of ``telltale sae`` for training. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["sae_train_app"]

sae_train_app = typer.Typer(no_args_is_help=True)
_Model = Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")]


@sae_train_app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Texts, tap, width, activation, ... (.yaml).", show_default=False)],
    *,
    model: _Model = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the file and its card.")] = Path("saes"),
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="As a control: on the same architecture with random weights."),
    ] = False,
) -> None:
    """Train a SAE and measure it on held-out text. What was interrupted goes on when it is started again."""
    from serving.commands.sae_train import sae_train as run

    run(config, model=model, out=out, random_weights=random_weights)


@sae_train_app.command("eval")
def evaluate(
    sae: Annotated[
        Path, typer.Argument(help="The .safetensors file of a SAE, or builtin:PACK/NAME.", show_default=False)
    ],
    *,
    config: Annotated[
        Path, typer.Option(help="Whose held-out text: a file of telltale sae train.", show_default=False)
    ],
    model: _Model = None,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Write the figures onto the card too.")] = False,
) -> None:
    """Measure a SAE: variance, active and dead latents, cross entropy, beside random directions; as JSON."""
    from serving.commands.sae_train import sae_evaluate as run

    run(sae, config=config, model=model, card=card)
