"""``telltale sae train`` and ``telltale sae eval``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from probes.artifact import write_card
from serving.builtin import DEFAULT_MODEL
from serving.commands.model import embedded_folder, say

_LINE_SECONDS = 10.0


def sae_train(config: Path, *, model: str | None, out: Path, random_weights: bool) -> None:
    """Train one sparse autoencoder, measure it and write it.

    Raises:
        probes.errors.TelltaleError: the file, the texts or the model are not usable.
    """
    from probes.sae.train.train import train_sae

    name = model or DEFAULT_MODEL
    folder = embedded_folder(name) or Path(name)
    with _bars() as bars:
        made = train_sae(config, model_dir=folder, model_id=name, out=out, progress=bars, random_weights=random_weights)
    say(f"wrote {made.path}: {made.path.stat().st_size / 1e6:.1f} MB")
    print(json.dumps(made.card.evaluation, indent=2))


def sae_evaluate(path: Path, *, config: Path, model: str | None, card: bool) -> None:
    """Measure one, and print the figures as JSON.

    Raises:
        probes.errors.TelltaleError: a file, the texts or the model are not usable.
    """
    from probes.packs.saes import open_sae
    from probes.sae.train.train import evaluate_file

    name = model or DEFAULT_MODEL
    folder = embedded_folder(name) or Path(name)
    stored = open_sae(path)
    with _bars() as bars:
        found = evaluate_file(stored.path, config, model_dir=folder, model_id=name, progress=bars)
    if card:
        write_card(stored.path, stored.card.model_copy(update={"evaluation": found}))
    print(json.dumps(found, indent=2))


class _Bars:
    """A bar for what takes long; where standard error is no terminal, a line every ten seconds."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._label = ""
        self._told = 0.0

    def say(self, text: str) -> None:
        """One line."""
        if self._bar is None:
            say(text)
        else:
            self._bar.console.print(f"telltale: {text}", markup=False, highlight=False)

    def advance(self, label: str, done: int, total: int, note: str = "") -> None:
        """See ``probes.sae.train.train.Progress``."""
        if self._bar is None:
            if done == total or time.monotonic() - self._told > _LINE_SECONDS:
                self._told = time.monotonic()
                say(f"{label}: {done} of {total}{f', {note}' if note else ''}")
            return
        if self._task is None or label != self._label:
            # What an earlier run has done does not count as speed.
            self._task, self._label = self._bar.add_task(label, total=total, completed=done, note=note), label
        self._bar.update(self._task, completed=done, note=note)


@contextmanager
def _bars() -> Iterator[_Bars]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Bars(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as bar:
        yield _Bars(bar)
