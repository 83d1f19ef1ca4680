"""Packs: folders of detectors that ship with Telltale, each folder for one model."""

from __future__ import annotations

from pathlib import Path

from probes.artifact import Artifact
from probes.errors import TelltaleError, did_you_mean

__all__ = ["PackError", "load_pack", "pack_names"]

_PREFIX = "builtin:"


class PackError(TelltaleError, ValueError):
    """A pack is not known."""


def pack_names() -> tuple[str, ...]:
    """The packs that ship, as a policy file names them."""
    return tuple(sorted(f"{_PREFIX}{folder.name}" for folder in _root().iterdir() if any(folder.glob("*.safetensors"))))


def load_pack(name: str) -> tuple[Artifact, ...]:
    """All artifacts of a pack, by name.

    Raises:
        PackError: there is no such pack.
        probes.artifact.ArtifactError: an artifact in it is damaged.
    """
    if name not in pack_names():
        raise PackError(f"pack {name!r} is not known. {did_you_mean(name, pack_names())}")
    folder = _root() / name.removeprefix(_PREFIX)
    return tuple(Artifact.load(path) for path in sorted(folder.glob("*.safetensors")))


def _root() -> Path:
    return Path(__file__).parent
