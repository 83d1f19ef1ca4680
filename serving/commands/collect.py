"""``telltale collect``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from probes.card import Format
from probes.errors import TelltaleError, did_you_mean
from probes.fit.reading.activation_manifest import TokenPositions
from probes.taps import Tap
from serving.arguments import engine_arguments
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say
from serving.engine.launch import server_environment

_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
Choice = TypeVar("Choice", bound=StrEnum)


class CollectOptionError(TelltaleError, ValueError):
    """An option of the command cannot be used."""


def collect(
    prompts: Path,
    *,
    out: Path,
    taps: str,
    text_format: str,
    positions: str,
    model: str | None,
    shard_mib: int,
    shard_tokens: int,
    flags: Sequence[str],
) -> None:
    """Capture activations with the serving engine.

    Raises:
        probes.errors.TelltaleError: an option, a line, the folder or the model is not usable.
    """
    name = model or DEFAULT_MODEL
    chosen_taps, chosen_format = _taps(taps), _member(Format, "--format", text_format)
    chosen_positions = _member(TokenPositions, "--positions", positions)
    if chosen_format is Format.RAW and chosen_positions is TokenPositions.TEMPLATE:
        raise CollectOptionError(
            "--positions template: raw text has no template. Use --positions last or --format chat."
        )
    for variable, value in (_QUIET | server_environment()).items():
        os.environ.setdefault(variable, value)
    folder = embedded_folder(name)
    from serving.engine.collect import Collector, CollectOrder

    order = CollectOrder(
        taps=chosen_taps,
        text_format=chosen_format,
        positions=chosen_positions,
        model_id=name,
        arguments=tuple(engine_arguments(name, flags, folder)),
        shard_bytes=shard_mib << 20,
        shard_tokens=shard_tokens,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("collecting", start=False, total=None)

        def show(tokens: int, total: int) -> None:
            if bar.tasks[0].started:
                bar.update(task, completed=tokens)
            else:  # what an earlier run has computed does not count as speed
                bar.reset(task, completed=tokens, total=total)

        collector = Collector(order, say=say)
        manifest = collector.collect(prompts, out, progress=show)
    collector.close()
    say(
        f"wrote {out}: {manifest.requests} requests, {manifest.rows} rows at {len(chosen_taps)} taps in "
        f"{len(manifest.shards)} shards; the first {manifest.skip_first} positions are sinks"
    )


class _Speed(ProgressColumn):
    """Tokens, and tokens per second."""

    def render(self, task: Task) -> Text:
        speed = f" {task.speed:,.0f} tokens/s" if task.speed else ""
        return Text(f"{int(task.completed):,} of {int(task.total or 0):,}{speed}")


def _taps(text: str) -> tuple[Tap, ...]:
    taps = tuple(Tap.parse(part.strip()) for part in text.split(","))
    if doubles := sorted({str(tap) for tap in taps if taps.count(tap) > 1}):
        raise CollectOptionError(f"--taps names {doubles[0]} twice; name each once.")
    return taps


def _member(kind: type[Choice], option: str, word: str) -> Choice:
    known = [member.value for member in kind]
    if word not in known:
        raise CollectOptionError(f"{option} is {word!r}. {did_you_mean(word, known)}")
    return kind(word)
