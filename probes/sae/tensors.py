"""The tensors of other libraries' files, as numpy arrays. Nothing in a file is executed; used offline only."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.sae.layouts.base import LayoutError

__all__ = ["object_in", "read_json", "read_npz", "read_safetensors", "read_torch"]

Tensors = dict[str, npt.NDArray[np.float32]]
_MAX_GROWTH = 100


def read_safetensors(path: Path) -> Tensors:
    """Every tensor as float32, bfloat16 ones too.

    Raises:
        LayoutError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float().numpy() for name, tensor in load_file(str(path)).items()}
    except (OSError, SafetensorError) as error:
        raise LayoutError(f"{path}: cannot be read as safetensors ({error}). Copy it again.") from error


def read_npz(path: Path) -> Tensors:
    """Every array of a numpy archive as float32; one that holds Python objects is refused.

    Raises:
        LayoutError: the file cannot be read, or an array is no array of numbers.
    """
    try:
        _refuse_bomb(path)
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name].astype(np.float32) for name in data.files}
    # The last five are what a damaged archive, or an array that claims to be huge, makes of the libraries that read it.
    except (
        OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error, MemoryError,
    ) as error:  # fmt: skip
        raise LayoutError(
            f"{path}: cannot be read as an archive of arrays ({error}). Arrays of numbers are read, Python objects are "
            "not, as they could execute. Save it again with numpy.savez."
        ) from error


def _refuse_bomb(path: Path) -> None:
    """Weights hardly compress: an archive that would become many times its size was made to fill the memory."""
    with zipfile.ZipFile(path) as archive:
        size = sum(item.file_size for item in archive.infolist())
    if size > _MAX_GROWTH * path.stat().st_size:
        raise LayoutError(
            f"{path}: would grow to {size:,} bytes, more than {_MAX_GROWTH} times its size. No weights compress like "
            "that: do not use it."
        )


def read_torch(path: Path) -> Tensors:
    """Every tensor of a state dictionary that torch saved, as float32; tensors and plain containers only.

    Raises:
        LayoutError: the file cannot be read, or holds something that would have to be executed to be read.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LayoutError(
            f"{path}: holds more than tensors: to read it would be to execute it. Where you trust it, save its state "
            "again by itself: torch.save(dictionary.state_dict(), 'ae.pt')."
        ) from error
    except Exception as error:  # a damaged file fails anywhere in torch's reader; each is said as ours
        raise LayoutError(f"{path}: cannot be read as a file of torch ({error}). Copy it again.") from error
    if not isinstance(found, Mapping):
        raise LayoutError(f"{path}: holds a {type(found).__name__}; a state dictionary of tensors is read.")
    return {str(name): tensor.float().numpy() for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        LayoutError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LayoutError(f"{path}: cannot be read as JSON ({error}). Copy it again.") from error
    if not isinstance(value, dict):
        raise LayoutError(f"{path}: holds a {type(value).__name__}; it must be a JSON object.")
    return value


def object_in(config: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    """The JSON object under a key; an empty one where there is none.

    Raises:
        LayoutError: something else stands there.
    """
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise LayoutError(f"{path}: {key!r} holds a {type(value).__name__}; it must be a JSON object.")
    return value
