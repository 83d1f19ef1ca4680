"""Where a training stands, in one safetensors file that is replaced whole; knows nothing of what is trained."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from probes.errors import TelltaleError

__all__ = ["Checkpoint", "CheckpointError"]

_MODULE = "module."
_ADAM = "adam."


class CheckpointError(TelltaleError, ValueError):
    """A checkpoint is damaged or belongs to another training."""


class Checkpoint:
    """One file.

    Args:
        path: of the file; need not exist.
        digest: of everything that decides what the training makes: another one is refused.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self._digest = digest

    def save(self, step: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state behind so many steps, atomically."""
        tensors = {_MODULE + name: tensor for name, tensor in module.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{_ADAM}{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        data = save(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            metadata={"step": str(step), "digest": self._digest},
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}.", delete=False) as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(handle.name, self.path)

    def restore(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the state of a checkpoint into both; nothing is done where there is none.

        Returns: the steps that are done.
        Raises:
            CheckpointError: it is damaged, or of another training.
        """
        if not self.path.is_file():
            return 0
        try:
            with safe_open(self.path, framework="pt") as handle:
                metadata: Mapping[str, str] = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - it has no iterator
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error}). Remove it: the training begins again."
            ) from error
        if metadata.get("digest") != self._digest:
            raise CheckpointError(
                f"{self.path}: belongs to a training with other rows or settings. Remove it to begin again, or give "
                "the settings that it was begun with."
            )
        module.load_state_dict(
            {name.removeprefix(_MODULE): t for name, t in tensors.items() if name.startswith(_MODULE)}
        )
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_ADAM):
                number, _, field = name.removeprefix(_ADAM).partition(".")
                state.setdefault(int(number), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(metadata["step"])
