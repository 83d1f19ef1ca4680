"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import serving
from serving.commands.alerts import alerts_app
from serving.commands.audit import audit_app, tail
from serving.commands.detector import detector_app
from serving.commands.gate import gate_app
from serving.commands.key import key_app
from serving.commands.policy_cli import policy_app
from serving.commands.sae_cli import sae_app
from serving.commands.sae_features_cli import sae_features_app
from serving.commands.sae_train_cli import sae_train_app
from serving.commands.sinks import sinks_app
from serving.commands.steer_cli import steer_app
from serving.commands.top_cli import top
from serving.log_format import LogFormat
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
app.add_typer(steer_app, name="steer")
app.add_typer(detector_app, name="detector")
app.add_typer(gate_app, name="gate")
app.add_typer(key_app, name="key")
sae_app.add_typer(sae_train_app)
sae_app.add_typer(sae_features_app)
app.add_typer(sae_app, name="sae")
app.add_typer(audit_app, name="audit")
app.add_typer(policy_app, name="policy")
app.add_typer(alerts_app, name="alerts")
app.command()(tail)
app.command()(top)
app.add_typer(sinks_app, name="sinks")
_PolicyOption = Annotated[Path | None, typer.Option("--policy", help="Policy file.", show_default=False)]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    policy: _PolicyOption = None,
    *,
    log_format: Annotated[
        LogFormat | None, typer.Option("--log-format", help="text or json; text, or what TELLTALE_LOG_FORMAT says.")
    ] = None,
    tracing: Annotated[bool, typer.Option("--tracing", help="Send OpenTelemetry traces (OTEL_* variables).")] = False,
    watch_policy: Annotated[
        bool, typer.Option("--watch-policy", help="Put the policy file in force whenever it changes.")
    ] = False,
) -> None:
    """Serve MODEL behind the OpenAI API, monitored: telltale serve [MODEL] [--policy FILE] [any vLLM flag].

    Without MODEL, the embedded SmolLM2-135M-Instruct is served on the CPU with its own pack and policy.
    """
    from serving.commands.serve import serve as run

    extra = list(context.args)
    model = extra.pop(0) if extra and not extra[0].startswith("-") else None
    run(model, policy, extra, watch_policy=watch_policy, log_format=log_format, tracing=tracing)


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
    recipes: Annotated[list[Path], typer.Argument(help="Recipes: data, settings, name.", show_default=False)],
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the artifacts and their cards.")] = Path("detectors"),
    encoder: Annotated[
        str, typer.Option(help="Text-only peer: minilm (a sentence embedding) or input (the model's own embeddings).")
    ] = "minilm",
) -> None:
    """Train, calibrate and evaluate detectors, one from each recipe."""
    from serving.commands.train import train as run

    run(recipes, model, out, encoder)


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="The .safetensors file of a detector.", show_default=False)],
    *,
    data: Annotated[
        Path | None, typer.Option(help="Rows to measure on, JSONL, both labels.", show_default=False)
    ] = None,
    train_rows: Annotated[
        Path | None,
        typer.Option("--train", help="The rows that it was trained on: most controls need them.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="In place of --data and --train: a recipe, its development and training rows."),
    ] = None,
    row_set: Annotated[
        str | None, typer.Option("--set", help="With --recipe: a set of its development.apart, by name.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="chat or raw, may be repeated; what the card is calibrated for."),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="prompt, stream or response; the card's first.")] = None,
    encoder: Annotated[
        str, typer.Option(help="Text-only peer: minilm (a sentence embedding) or input (the model's own embeddings).")
    ] = "minilm",
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("evaluations"),
    card: Annotated[bool, typer.Option("--card/--no-card", help="Write the figures onto the card too.")] = False,
) -> None:
    """Measure a detector on rows that it was not trained on, beside every control, and give a verdict by rule."""
    from serving.commands.evaluate import evaluate as run

    run(
        artifact,
        data=data,
        train=train_rows,
        recipe=recipe,
        row_set=row_set,
        formats=formats or [],
        stage=stage,
        encoder=encoder,
        model=model,
        seed=seed,
        out=out,
        card=card,
    )


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="What `telltale eval` wrote.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Render it as one self-contained page.")] = None,
) -> None:
    """Refuse a report that lacks n, intervals, controls or its split policy; render one that does not."""
    from serving.commands.evaluate import report as run

    run(file, html)


@app.command()
def calibrate(
    artifacts: Annotated[list[Path], typer.Argument(help="The .safetensors files of detectors.", show_default=False)],
    *,
    benign: Annotated[
        Path, typer.Option(help='Requests that must not fire: {"prompt": "..."} a line.', show_default=False)
    ],
    labelled: Annotated[Path | None, typer.Option(help="Labelled requests, to state probabilities too.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="chat or raw, once or twice; the card's if left out.")
    ] = None,
    stage: Annotated[str, typer.Option(help="prompt, stream or response.")] = "prompt",
    aggregate: Annotated[str | None, typer.Option(help="KIND,NAME=VALUE,...; the card's if left out.")] = None,
    target_fpr: Annotated[
        float | None, typer.Option(min=1e-6, max=0.5, help="Share of benign requests that may fire; 0.01 if left out.")
    ] = None,
    total_fpr: Annotated[
        float | None, typer.Option(min=1e-6, max=0.5, help="Share that may fire any of the detectors; it is divided.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="How --total-fpr is divided: 2,1; evenly if left out.")] = None,
    share: Annotated[float, typer.Option(min=1e-6, max=1, help="Of --target-fpr, for each detector.")] = 1.0,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of the statement.")] = 0.95,
    method: Annotated[str, typer.Option(help="pac or conformal.")] = "pac",
    buckets: Annotated[
        str, typer.Option(help="Thresholds by length: auto (where it grows with length), off, or lengths: 64,256.")
    ] = "auto",
    model: Annotated[str | None, typer.Option("--model", help="Model; the embedded one if left out.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for copies; in place if left out.")] = None,
) -> None:
    """Set a detector's threshold by your own benign requests, with a stated rate of false alarms."""
    from serving.commands.calibrate import CalibrateOptions
    from serving.commands.calibrate import calibrate as run

    run(
        artifacts,
        CalibrateOptions(
            benign=benign,
            labelled=labelled,
            formats=formats or [],
            stage=stage,
            aggregate=aggregate,
            target_fpr=target_fpr,
            total_fpr=total_fpr,
            weights=weights,
            share=share,
            confidence=confidence,
            method=method,
            buckets=buckets,
            model=model,
            out=out,
        ),
    )


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
    *,
    audit: Annotated[
        bool, typer.Option("--audit", help="Measure audit trail, webhook and scrapes instead, against none of them.")
    ] = False,
    scrape_seconds: Annotated[float, typer.Option(min=0.1, help="With --audit: between two scrapes.")] = 1.0,
) -> None:
    """Measure what monitoring costs: two servers, one plain, in alternating rounds."""
    if audit:
        from serving.commands.bench_outlets import bench_outlets

        bench_outlets(rounds=rounds, out=out, scrape_seconds=scrape_seconds)
        return
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
