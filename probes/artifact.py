"""An artifact on disk: a safetensors file and, beside it, a JSON card. Nothing in it can execute."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from probes.card import ArtifactCard, Card, ModelRef
from probes.errors import TelltaleError
from probes.taps import Tap

_CHUNK = 1 << 20
C = TypeVar("C", bound=ArtifactCard)


class ArtifactError(TelltaleError, ValueError):
    """An artifact cannot be read, is damaged, or belongs to another model."""


@dataclass(frozen=True)
class Stored(Generic[C]):
    """Tensors and card of one artifact.

    Attributes:
        path: the safetensors file.
        card: what it says about itself.
        tensors: name -> array, read-only.
        card_type: the class of the card.
        what: it is, in messages.
        how: the command that makes one.
    """

    path: Path
    card: C
    tensors: Mapping[str, npt.NDArray[np.generic]]
    card_type: ClassVar[type[ArtifactCard]]
    what: ClassVar[str]
    how: ClassVar[str]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``x.safetensors`` and ``x.card.json``.

        Raises:
            ArtifactError: a file is missing or damaged, the card has unknown or missing fields, or the digest of the
                tensors is not the one on the card.
        """
        card_path = card_path_of(path)
        data = _read(path)
        try:
            card = cls.card_type.model_validate_json(_read(card_path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(
                f"{card_path}: field {where!r}: {first['msg']} ({error.error_count()} problem(s)). "
                "The card was edited or written by another version: write the artifact again."
            ) from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != card.tensors_digest:
            raise ArtifactError(
                f"{path}: SHA-256 is {digest[:12]}..., its card says {card.tensors_digest[:12]}...: the file is "
                "truncated, damaged or not the one that the card describes. Copy both files again."
            )
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ArtifactError(f"{path}: not a safetensors file ({error}). Copy it again.") from error
        except KeyError as error:  # how safetensors says that numpy has no such type
            raise ArtifactError(
                f"{path}: holds a tensor of type {error.args[0]}. Float types that are read: F64, F32, F16. "
                f"Make the {cls.what} again ({cls.how})."
            ) from error
        return cls(path=path, card=card, tensors=tensors)  # type: ignore[arg-type]  # of its own type

    def vector(self, name: str, size: int) -> npt.NDArray[np.float64]:
        """Tensor ``name`` as (size,) float64.

        Raises:
            ArtifactError: it is missing, has another shape or holds a value that is not finite.
        """
        return self._finite(name, (size,))

    def positive(self, name: str, *shape: int) -> npt.NDArray[np.float64]:
        """Tensor ``name`` as float64 of this shape, all above 0.

        Raises:
            ArtifactError: see ``vector``; or a value is not positive.
        """
        values = self._finite(name, shape)
        if not np.all(values > 0):
            raise ArtifactError(
                f"{self.path}: tensor {name!r} holds {int(np.sum(values <= 0))} values that are not positive. "
                f"Make the {self.what} again ({self.how}): a dimension without spread needs 1."
            )
        return values

    def matrix(self, name: str, rows: int | None, columns: int | None) -> npt.NDArray[np.float64]:
        """Tensor ``name`` as (rows, columns) float64; None allows any number but 0.

        Raises:
            ArtifactError: see ``vector``.
        """
        return self._finite(name, (rows, columns))

    def _finite(self, name: str, shape: tuple[int | None, ...]) -> npt.NDArray[np.float64]:
        if name not in self.tensors:
            raise ArtifactError(f"{self.path}: tensor {name!r} is missing; there are {sorted(self.tensors)}.")
        found = np.asarray(self.tensors[name])
        fits = found.ndim == len(shape) and all(
            (there > 0 if wanted is None else there == wanted) for there, wanted in zip(found.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            wanted += "," if len(shape) == 1 else ""
            raise ArtifactError(f"{self.path}: tensor {name!r} has the shape {found.shape}; it must be ({wanted}).")
        values = found.astype(np.float64)
        if not np.all(np.isfinite(values)):
            raise ArtifactError(
                f"{self.path}: tensor {name!r} holds NaN or infinite values. Make the {self.what} again ({self.how})."
            )
        return values

    def require_model(self, served: ModelRef) -> None:
        """Refuse a model that is not the one on the card.

        Raises:
            ArtifactError: names each field that differs.
        """
        card = self.card.model
        differing = [
            f"{field} (card: {_short(getattr(card, field))}, served: {_short(getattr(served, field))})"
            for field in card.differing(served)
        ]
        if differing:
            raise ArtifactError(
                f"{self.path}: {self.what} {self.card.name!r} was made on {card.id!r} and does not fit the served "
                f"model {served.id!r}. Differing: {'; '.join(differing)}. Serve the model on the card, or make the "
                f"{self.what} on this one ({self.how})."
            )


class Artifact(Stored[Card]):
    """Tensors and card of one detector."""

    card_type = Card
    what = "detector"
    how = "telltale train"

    def save(self, path: Path) -> Artifact:
        """Write tensors and card, each atomically.

        Raises:
            ArtifactError: the path does not end in ``.safetensors``.
        """
        return save_artifact(path, self.card, self.tensors)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Those on the card.

        Raises:
            probes.taps.TapError: the card names one that there is not.
        """
        return tuple(Tap.parse(tap) for tap in self.card.taps)

    @property
    def only_tap(self) -> Tap:
        """That of a kind which reads one.

        Raises:
            ArtifactError: the card lists several.
        """
        if len(self.card.taps) != 1:
            raise ArtifactError(
                f"{self.path}: a detector of the kind {self.card.kind!r} reads one tap; its card lists "
                f"{self.card.taps}."
            )
        return self.taps[0]


def card_path_of(path: Path) -> Path:
    """Where the card of a safetensors file stands."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".card.json")


def save_artifact(path: Path, card: Card, tensors: Mapping[str, npt.NDArray[np.generic]]) -> Artifact:
    """Write a detector; see ``save_tensors``."""
    return Artifact(path=path, card=save_tensors(path, card, tensors), tensors=dict(tensors))


def save_tensors(path: Path, card: C, tensors: Mapping[str, npt.NDArray[np.generic]]) -> C:
    """Write tensors and card, each atomically.

    Returns: the card, whose ``tensors_digest`` is set here.

    Raises:
        ArtifactError: the path does not end in ``.safetensors``.
    """
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path}: an artifact's file name ends in .safetensors")
    data = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    card = card.model_copy(update={"tensors_digest": hashlib.sha256(data).hexdigest()})
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, data)
    write_card(path, card)
    return card


def write_card(path: Path, card: ArtifactCard) -> None:
    """Write the card of a safetensors file anew, atomically; the tensors stay as they are."""
    text = json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    _write(card_path_of(path), text.encode())


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror}). Check the path in the policy file.") from error


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.chmod(handle.name, 0o644)
    os.replace(handle.name, path)


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) == 64 else text  # noqa: PLR2004 - length of a SHA-256
