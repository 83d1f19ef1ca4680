"""``telltale doctor``."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

import serving
from monitor.yaml_file import read_policy_file
from serving.arguments import ArgumentError, parse_serve
from serving.builtin import DEFAULT_MODEL, is_builtin
from serving.commands.model import embedded_folder, embedded_policy, say
from serving.engine.launch import prepare_environment

_EMBEDDED_FLAGS = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "536870912")
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


def doctor(model: str | None, policy: Path | None) -> None:
    """Start the engine, send one prompt through, and show what was seen.

    Raises:
        probes.errors.TelltaleError: something is wrong; the text says what.
    """
    if policy is None:
        if model is not None and not is_builtin(model):
            raise ArgumentError(f"model {model!r} has no policy of its own: telltale doctor {model} --policy FILE.")
        policy = embedded_policy(model or DEFAULT_MODEL)
    name = parse_serve(model, (), policy_model=read_policy_file(policy).config.model).model
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    prepare_environment(policy)
    folder = embedded_folder(name)
    say("starting the engine")
    from serving.engine.doctor import diagnose

    flags = _EMBEDDED_FLAGS if folder is not None else ()
    diagnosis = diagnose([str(folder or name), *flags])
    console = Console()
    deployment, proof = diagnosis.deployment, diagnosis.proof
    _table(
        console,
        "versions",
        [
            ("telltale", serving.__version__),
            (" ".join(diagnosis.engine[:1]), diagnosis.engine[1]),
            ("torch", version("torch")),
            ("python", platform.python_version()),
        ],
    )
    reference = deployment.model
    _table(
        console,
        "model",
        [
            ("name", name),
            ("weights", reference.weight_digest[:16]),
            ("tokenizer", reference.tokenizer_digest[:16]),
            ("chat template", reference.chat_template_digest[:16]),
            ("shape", f"{reference.num_layers} layers, {reference.d_model} dimensions, {reference.dtype}"),
            ("worker", diagnosis.runner),
            ("scheduler", diagnosis.scheduler),
            ("policy", f"{policy} ({proof.digest[:16]})"),
        ],
    )
    bank = deployment.plan.bank
    read = {
        str(matrix.tap): f"{matrix.used} of {bank.capacity} directions, ran {proof.taps[str(matrix.tap)]} times"
        for matrix in bank.matrices
    }
    _table(console, "taps", read.items())
    _table(
        console,
        "one scored prompt",
        [
            ("scored", f"{proof.scored} positions"),
            ("skipped", ", ".join(f"{reason} {count}" for reason, count in proof.skipped.items())),
            ("canary", ", ".join(proof.canaries) or "-"),
            ("without a canary", ", ".join(proof.without_canary) or "-"),
            ("action", str(proof.described["action"])),
            *((f"{item['name']} at {item['stage']}", "fired" if item["fired"] else "-")
              for item in proof.described["detectors"]),
        ],
    )  # fmt: skip
    console.print("ok: every process runs this plan, every tap ran, every position is accounted for")


def _table(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
