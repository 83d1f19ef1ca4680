"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import serving
from serving.packages import shadowed_packages

EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="telltale",
    help="Serve a language model with its activations watched: score every token, decide by policy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
steer_app = typer.Typer(help="Judge a steering direction, or a detector's own, offline.", no_args_is_help=True)
app.add_typer(steer_app, name="steer")
_PolicyOption = Annotated[Path | None, typer.Option("--policy", help="Policy file.", show_default=False)]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context, policy: _PolicyOption = None) -> None:
    """Serve MODEL behind the OpenAI API, monitored: telltale serve [MODEL] [--policy FILE] [any vLLM flag].

    Without MODEL, the embedded SmolLM2-135M-Instruct is served on the CPU with its own pack and policy.
    """
    from serving.commands.serve import serve as run

    extra = list(context.args)
    model = extra.pop(0) if extra and not extra[0].startswith("-") else None
    run(model, policy, extra)


@app.command()
def check(policy: Annotated[Path, typer.Argument(help="Policy file.", show_default=False)]) -> None:
    """Check a policy file and its artifacts, without a model."""
    from serving.commands.check import check as run

    run(policy)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Model; the embedded one if left out.")] = None,
    policy: _PolicyOption = None,
    compat: Annotated[bool, typer.Option("--compat", help="Only compare vLLM's functions with what was read.")] = False,
) -> None:
    """Start the engine, send one prompt through, and show versions, model, taps and scores."""
    if compat:
        from serving.commands.compat import show_compat

        show_compat()
        return
    from serving.commands.doctor import doctor as run

    run(model, policy)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def collect(
    context: typer.Context,
    prompts: Annotated[Path, typer.Argument(help="Prompts, conversations or replies (.jsonl).", show_default=False)],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder for the activations.", show_default=False)],
    taps: Annotated[str, typer.Option(help="Where, e.g. resid_post.12,resid_post.15.", show_default=False)],
    text_format: Annotated[str, typer.Option("--format", help="What the prompts are: chat or raw.")] = "chat",
    positions: Annotated[str, typer.Option(help="Tokens kept: last, template, response, prompt or all.")] = "last",
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    shard_mib: Annotated[int, typer.Option(min=1, help="Size of a shard, at most.")] = 256,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed for a shard, at most.")] = 65536,
) -> None:
    """Capture activations with the serving engine, at the same taps: telltale collect PROMPTS ... [any vLLM flag]."""
    from serving.commands.collect import collect as run

    run(
        prompts,
        out=out,
        taps=taps,
        text_format=text_format,
        positions=positions,
        model=model,
        shard_mib=shard_mib,
        shard_tokens=shard_tokens,
        flags=context.args,
    )


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe: data, settings, name.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the artifact and its card.")] = Path("detectors"),
) -> None:
    """Train, calibrate and evaluate a detector from a recipe."""
    from serving.commands.train import train as run

    run(recipe, model, out)


@app.command()
def vector(
    source: Annotated[
        Path,
        typer.Argument(
            help="Contrast pairs (.jsonl), a control vector (.gguf) or a tensor (.safetensors).", show_default=False
        ),
    ],
    *,
    layer: Annotated[int, typer.Option(min=0, help="Layer after which it is written.", show_default=False)],
    name: Annotated[str, typer.Option(help="What to call it.", show_default=False)],
    more_is: Annotated[
        str, typer.Option(help="What more of it makes the model: safer, less_safe or neutral.", show_default=False)
    ],
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    description: Annotated[str, typer.Option(help="What it stands for.")] = "",
    method: Annotated[str, typer.Option(help="How it is found in the pairs: mean or pca.")] = "mean",
    text_format: Annotated[str, typer.Option("--format", help="What the texts are: chat or raw.")] = "chat",
    read: Annotated[str, typer.Option(help="Which rows stand for a text: last or mean.")] = "last",
    tensor: Annotated[str | None, typer.Option(help="Name of the tensor in a .safetensors file.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the direction and its card.")] = Path("steers"),
) -> None:
    """Make a steering direction for a policy file's 'steers'."""
    from serving.commands.vector import vector as run

    run(
        source,
        model=model,
        layer=layer,
        name=name,
        more_is=more_is,
        description=description,
        method=method,
        text_format=text_format,
        read=read,
        tensor=tensor,
        out=out,
    )


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


@app.command()
def canary(
    artifact: Annotated[Path, typer.Argument(help="The .safetensors file of a detector.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
) -> None:
    """Add a canary to a detector's card: scores of a fixed prompt, computed by transformers in float32."""
    from serving.commands.canary import canary as run

    run(artifact, model)


@app.command()
def schema(
    check_only: Annotated[bool, typer.Option("--check", help="Fail if the committed schema differs.")] = False,
) -> None:
    """Write the JSON schema of the policy file."""
    from serving.commands.schema import schema as run

    run(check_only=check_only)


@app.command()
def bench(
    rounds: Annotated[int, typer.Option(min=3, help="Alternating rounds, in all.")] = 15,
    starts: Annotated[int, typer.Option(min=1, help="How often both servers are started for them.")] = 4,
    out: Annotated[Path, typer.Option("--out", help="Where the report goes.")] = Path("docs/benchmarks"),
    steered: Annotated[bool, typer.Option("--steered", help="Steer every request too, after two layers.")] = False,
) -> None:
    """Measure what monitoring costs: two servers, one plain, in alternating rounds."""
    from serving.commands.bench import bench as run

    run(rounds=rounds, starts=starts, out=out, steered=steered)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"telltale {serving.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: errors that the user can mend are printed without a traceback."""
    problem = shadowed_packages()
    if problem is not None:
        sys.stderr.write(f"telltale: {problem}\n")
        sys.exit(EXIT_USAGE)
    from probes.errors import TelltaleError

    try:
        app()
    except TelltaleError as error:
        sys.stderr.write(f"telltale: {error}\n")
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
