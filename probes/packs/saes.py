"""Sparse autoencoders that ship with Telltale: each in the pack of its model, called by a name."""

from __future__ import annotations

from pathlib import Path

from probes.errors import did_you_mean
from probes.packs import PackError
from probes.sae.file import SaeFile, load_sae

__all__ = ["is_shipped", "open_sae", "sae_names", "shipped_sae"]

_PREFIX = "builtin:"
_FOLDER = "saes"


def sae_names() -> tuple[str, ...]:
    """The autoencoders that ship, as a policy file and the command line name them: ``builtin:PACK/NAME``."""
    found = _root().glob(f"*/{_FOLDER}/*.safetensors")
    return tuple(sorted(f"{_PREFIX}{path.parent.parent.name}/{path.stem}" for path in found))


def is_shipped(name: str) -> bool:
    """Whether a name asks for one that ships, known or not."""
    return name.startswith(_PREFIX)


def shipped_sae(name: str) -> Path:
    """The file of one that ships.

    Raises:
        PackError: there is none of this name.
    """
    if name not in sae_names():
        raise PackError(f"sparse autoencoder {name!r} is not known. {did_you_mean(name, sae_names())}")
    pack, _, stem = name.removeprefix(_PREFIX).partition("/")
    return _root() / pack / _FOLDER / f"{stem}.safetensors"


def open_sae(path: Path) -> SaeFile:
    """An autoencoder as the command line names it: a file, or one that ships.

    Raises:
        PackError: there is none of this name.
        probes.artifact.ArtifactError: a file is missing or damaged.
    """
    return load_sae(shipped_sae(str(path)) if is_shipped(str(path)) else path)


def _root() -> Path:
    return Path(__file__).parent
