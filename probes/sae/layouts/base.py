"""What a layout is: how one library lays a sparse autoencoder out in files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError
from probes.sae.sae import Sae
from probes.taps import Tap


class LayoutError(TelltaleError, ValueError):
    """Files that hold no sparse autoencoder, or one that cannot be served."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What the caller knows and files may lack.

    Attributes:
        tap: what it reads; None: the files must say.
        input_factor: by which inputs are multiplied; None: the files must say, or need none.
    """

    tap: Tap | None = None
    input_factor: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What files hold.

    Attributes:
        sae: the weights. Where ``rank`` is given its thresholds are 0 and stand for nothing yet.
        origin: library and name, for people.
        rank: it keeps the ``rank`` largest latents of each row, and no threshold is known that stands for it.
        model: the model that it was trained on, as the files name it; None: they do not.
        corpus: the text that it was trained on; None: not stated.
    """

    sae: Sae
    origin: str
    rank: int | None = None
    model: str | None = None
    corpus: str | None = None


class Layout(ABC):
    """How one library lays files out. Subclasses live one to a file and are found by their ``kind``."""

    kind: ClassVar[str]
    files: ClassVar[str]
    """What is looked for, in messages."""

    @classmethod
    @abstractmethod
    def fits(cls, path: Path) -> bool:
        """Whether a folder or file is laid out like this, by names and keys alone."""

    @classmethod
    @abstractmethod
    def read(cls, path: Path, stated: Stated) -> Found:
        """Read it.

        Raises:
            LayoutError: a tensor is missing or has another shape, or the kind cannot be served, with the reason.
            probes.sae.sae.SaeError: parts do not fit together.
        """


def take(
    tensors: Mapping[str, npt.NDArray[np.float32]], name: str, shape: tuple[int, ...], path: Path
) -> npt.NDArray[np.float32]:
    """A tensor of a stated shape.

    Raises:
        LayoutError: it is missing or has another shape.
    """
    if name not in tensors:
        raise LayoutError(f"{path}: tensor {name!r} is missing; there are {sorted(tensors)}. Copy the file again.")
    if tensors[name].shape != shape:
        raise LayoutError(
            f"{path}: tensor {name!r} has the shape {tensors[name].shape}; by the configuration beside it, it must be "
            f"{shape}. The two files do not belong together: copy both again."
        )
    return tensors[name]


def agreed_tap(found: Tap | None, stated: Stated, path: Path) -> Tap:
    """Where it reads, by its files and by the caller.

    Raises:
        LayoutError: neither says, or they contradict each other.
    """
    if found is None and stated.tap is None:
        raise LayoutError(f"{path}: does not say where in the model it reads. Say it: --tap resid_post.LAYER")
    if found is not None and stated.tap is not None and found != stated.tap:
        raise LayoutError(
            f"{path}: reads {found} by its files, and --tap says {stated.tap}. At another place its latents mean "
            "nothing. Leave --tap out."
        )
    tap = found or stated.tap
    if tap is None:  # pragma: no cover - refused above
        raise AssertionError("no tap")
    return tap
