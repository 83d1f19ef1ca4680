"""Find the folder of a model that a command was given."""

from __future__ import annotations

import sys
from pathlib import Path

from serving.builtin import DEFAULT_MODEL, ensure_builtin_model, is_builtin


def say(text: str) -> None:
    """One line of progress; standard output belongs to results."""
    sys.stderr.write(f"telltale: {text}\n")
    sys.stderr.flush()


def embedded_folder(model: str) -> Path | None:
    """The folder of an embedded model, made if needed; None for any other model."""
    return ensure_builtin_model(model, progress=say).path if is_builtin(model) else None


def embedded_policy(model: str = DEFAULT_MODEL) -> Path:
    """The policy file that comes with an embedded model."""
    import probes.packs

    return Path(probes.packs.__file__).parent / model.partition(":")[2] / "telltale.yaml"
