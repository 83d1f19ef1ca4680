"""The command line of ``telltale steer``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["steer_app"]

steer_app = typer.Typer(help="Judge a steering direction, or a detector's own, offline.", no_args_is_help=True)


@steer_app.command("eval")
def steer_eval(
    artifact: Annotated[Path, typer.Argument(help="The .safetensors file of a direction.", show_default=False)],
    *,
    prompts: Annotated[Path, typer.Option(help='Chat prompts: {"prompt": "..."} a line.', show_default=False)],
    examples: Annotated[
        Path, typer.Option(help="What the judge learns from: contrast pairs, or labelled texts.", show_default=False)
    ],
    instruction: Annotated[
        str, typer.Option(help="System message of the prompt-only baseline: asks for the same.", show_default=False)
    ],
    op: Annotated[str, typer.Option(help="Operator: add, ablate or cap.")] = "add",
    strengths: Annotated[
        str | None,
        typer.Option(help="At least five, with commas; 0.05,0.1,0.2,0.3,0.5 for add, 0.2,0.4,...,1 for others."),
    ] = None,
    positions: Annotated[str, typer.Option(help="Rows that are written to: generated, prompt or all.")] = "generated",
    max_dose: Annotated[float, typer.Option(min=0, help="Largest change of a row, in median norms.")] = 0.5,
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    max_tokens: Annotated[int, typer.Option(min=4, help="Of a reply.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Random directions at each strength.")] = 3,
    neutral_lines: Annotated[int, typer.Option(min=1, max=64, help="Lines of ordinary text for KL.")] = 64,
    report: Annotated[Path | None, typer.Option(help="Folder for report, plot and figures.")] = None,
) -> None:
    """Measure a steer at several strengths, beside random directions and a prompt; the verdict goes onto its card."""
    from serving.commands.steer import EvalOptions
    from serving.commands.steer import evaluate as run

    run(
        artifact,
        EvalOptions(
            op=op,
            strengths=strengths,
            positions=positions,
            max_dose=max_dose,
            prompts=prompts,
            examples=examples,
            instruction=instruction,
            model=model,
            max_tokens=max_tokens,
            seeds=seeds,
            neutral_lines=neutral_lines,
            report=report,
        ),
    )


@steer_app.command("causal")
def steer_causal(
    detector: Annotated[Path, typer.Argument(help="The .safetensors file of a linear detector.", show_default=False)],
    *,
    pairs: Annotated[
        Path,
        typer.Option(help='{"prompt", "target", "other", "label"} a line: two replies to each.', show_default=False),
    ],
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    strength: Annotated[float, typer.Option(min=0.001, max=2, help="Of the addition, in median norms.")] = 0.1,
    directions: Annotated[int, typer.Option(min=99, help="Random directions.")] = 100,
    neutral_lines: Annotated[int, typer.Option(min=1, max=64, help="Lines of ordinary text for KL.")] = 32,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures too.")] = None,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Write the level onto the detector's card.")] = True,
) -> None:
    """Measure whether the model uses what a detector reads: ablate its direction, add it, and random ones beside it."""
    from serving.commands.steer import causal as run

    run(
        detector,
        pairs=pairs,
        model=model,
        strength=strength,
        directions=directions,
        neutral_lines=neutral_lines,
        out=out,
        card=card,
    )


@steer_app.command("together")
def steer_together(
    policy: Annotated[Path, typer.Argument(help="A policy file.", show_default=False)],
    *,
    steers: Annotated[str, typer.Option(help="Names of its steers, with commas, at one layer.", show_default=False)],
    prompts: Annotated[Path, typer.Option(help='Chat prompts: {"prompt": "..."} a line.', show_default=False)],
    examples: Annotated[
        Path, typer.Option(help="What the judge learns from: contrast pairs, or labelled texts.", show_default=False)
    ],
    instruction: Annotated[
        str, typer.Option(help="System message of the prompt-only baseline: asks for the same.", show_default=False)
    ],
    less: Annotated[bool, typer.Option("--less", help="They are to make less of the behaviour.")] = False,
    strengths: Annotated[str, typer.Option(help="What they write is multiplied by.")] = "0.5,1,2",
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    max_tokens: Annotated[int, typer.Option(min=4, help="Of a reply.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Random directions at each strength.")] = 3,
    neutral_lines: Annotated[int, typer.Option(min=1, max=64, help="Lines of ordinary text for KL.")] = 64,
    report: Annotated[Path | None, typer.Option(help="Folder for table and figures.")] = None,
) -> None:
    """Measure steers of a policy file together, latents too: beside random directions and a prompt."""
    from serving.commands.steer_together import TogetherOptions
    from serving.commands.steer_together import together as run

    run(
        policy,
        TogetherOptions(
            steers=steers,
            less=less,
            strengths=strengths,
            prompts=prompts,
            examples=examples,
            instruction=instruction,
            model=model,
            max_tokens=max_tokens,
            seeds=seeds,
            neutral_lines=neutral_lines,
            report=report,
        ),
    )
