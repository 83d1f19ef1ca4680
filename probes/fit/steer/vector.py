"""Make a steering direction: from contrast pairs, or of one that was found elsewhere; with the units on its card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from probes.aggregate.base import Aggregator
from probes.aggregate.last import Last
from probes.aggregate.mean import Mean
from probes.cachedir import user_cache_dir
from probes.card import Format, ModelRef
from probes.errors import did_you_mean
from probes.fit.reading.activations import ActivationReader
from probes.fit.rows.ordinary import Ordinary, corpus_digest, read_ordinary
from probes.fit.steer.pairs import PairError, VectorMethod, direction_of, pairs_digest, quality_of, read_pairs
from probes.modelref import read_model_ref
from probes.steering.artifact import Safety, SteerArtifact, SteerCard, save_steer
from probes.steering.base import Float64
from probes.taps import Tap

__all__ = [
    "Subject",
    "import_vector",
    "open_subject",
    "read_gguf_direction",
    "read_safetensors_direction",
    "vector_from_pairs",
    "write_direction",
]

READ: Mapping[str, Aggregator] = {"last": Last(), "mean": Mean()}
"""Which of a text's rows stand for it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a direction is made for.

    Attributes:
        model_dir: folder of the model in transformers' layout.
        model_id: what people call it.
        layer: after which it is written.
        name, description, more_is: for the card.
        created_by: version that writes it.
    """

    model_dir: Path
    model_id: str
    layer: int
    name: str
    description: str
    more_is: Safety
    created_by: str = ""


def vector_from_pairs(
    subject: Subject,
    path: Path,
    *,
    method: VectorMethod,
    text_format: Format,
    read: str,
    out: Path,
    progress: Callable[[str], None],
) -> SteerArtifact:
    """Find a direction in contrast pairs, and write it.

    Args:
        subject: model, layer and card.
        path: of the pairs, as ``read_pairs`` takes them.
        method: how the direction is found.
        text_format: whether texts are user messages or stand as they are.
        read: ``last`` (a text's last token) or ``mean`` (all its tokens behind the sink).
        out: folder.
        progress: told what is being done.
    Raises:
        PairError: the pairs have no direction.
        probes.errors.TelltaleError: the model cannot be read.
    """
    pairs = read_pairs(path)
    if read not in READ:
        raise PairError(f"--read is {read!r}. {did_you_mean(read, READ)}")
    reader = open_subject(subject, progress)
    ordinary = read_ordinary(reader, subject.layer)
    found = reader.read(
        [text for pair in pairs for text in (pair.positive, pair.negative)],
        text_format=text_format,
        aggregates=(READ[read],),
        skip_first=ordinary.skip_first,
        label="pairs",
    )
    means = found.at(subject.layer, READ[read]).astype(np.float64)
    differences = means[0::2] - means[1::2]
    quality = quality_of(differences, method)
    training = {
        "pairs": path.name,
        "pairs_digest": pairs_digest(pairs),
        "method": method.value,
        "format": text_format.value,
        "read": read,
    }
    progress(
        f"{quality.pairs} pairs: mean cosine of one with the direction {quality.agreement:.2f}, "
        f"{quality.reversed_share:.0%} point the other way"
    )
    return write_direction(
        subject,
        direction_of(differences, method),
        model=reader.model,
        ordinary=ordinary,
        training=training,
        evaluation={"pairs": quality.as_dict()},
        out=out,
    )


def import_vector(
    subject: Subject, direction: Float64, *, source: Mapping[str, Any], out: Path, progress: Callable[[str], None]
) -> SteerArtifact:
    """Write a direction that was found elsewhere; its length says nothing here, strengths are in units of the stream.

    Args:
        subject: model, layer and card.
        direction: (d_model,) of any length.
        source: where it comes from, for the card.
        out: folder.
        progress: told what is being done.
    Raises:
        PairError: it has another width than the model, or no length.
    """
    reader = open_subject(subject, progress)
    length = float(np.linalg.norm(direction))
    if direction.shape != (reader.model.d_model,):
        raise PairError(
            f"the direction has the shape {direction.shape}; {subject.model_id} has {reader.model.d_model} dimensions. "
            "It belongs to another model."
        )
    if not np.isfinite(length) or length == 0:
        raise PairError(f"the direction's length is {length}; it must be a finite number above 0.")
    return write_direction(
        subject,
        direction / length,
        model=reader.model,
        ordinary=read_ordinary(reader, subject.layer),
        training={**source, "length": round(length, 6)},
        evaluation={},
        out=out,
    )


def read_safetensors_direction(path: Path, tensor: str | None) -> Float64:
    """A direction from a plain safetensors file.

    Args:
        path: of the file.
        tensor: its name; may be left out if the file holds one tensor only.
    Raises:
        PairError: the file cannot be read, or the tensor is not there or not a vector.
    """
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise PairError(f"{path}: cannot be read as safetensors of float types that numpy has ({error}).") from error
    if tensor is None and len(tensors) != 1:
        raise PairError(f"{path}: holds {len(tensors)} tensors. Say which one with --tensor: {sorted(tensors)[:12]}.")
    name = tensor if tensor is not None else next(iter(tensors))
    if name not in tensors:
        raise PairError(f"{path}: has no tensor {name!r}. {did_you_mean(name, tensors)}")
    return np.asarray(tensors[name]).astype(np.float64).squeeze()


def read_gguf_direction(path: Path, layer: int) -> Float64:
    """A direction from a control vector in GGUF, as repeng writes it and llama.cpp reads it.

    Its tensors are named ``direction.<layer>`` and are added after that layer, counted from 0.

    Args:
        path: of the file.
        layer: which one.
    Raises:
        PairError: the file cannot be read, is no control vector, or has no direction for the layer.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
    except (OSError, ValueError) as error:
        raise PairError(f"{path}: cannot be read as GGUF ({error}).") from error
    found = {tensor.name: tensor for tensor in reader.tensors}
    name = f"direction.{layer}"
    if name not in found:
        known = [other for other in found if other.startswith("direction.")]
        raise PairError(f"{path}: has no {name!r}. {did_you_mean(name, known)}")
    data = np.asarray(found[name].data)
    if data.dtype not in {np.dtype(np.float32), np.dtype(np.float16)}:
        raise PairError(f"{path}: {name} is {data.dtype}; control vectors in float32 and float16 are read.")
    return data.astype(np.float64).squeeze()


def open_subject(subject: Subject, progress: Callable[[str], None]) -> ActivationReader:
    """A reader of the subject's model at its layer.

    Args:
        subject: model and layer.
        progress: told how far it is.
    Raises:
        probes.errors.TelltaleError: the model cannot be read.
    """
    model = read_model_ref(subject.model_dir, model_id=subject.model_id, dtype="float32")
    return ActivationReader(
        subject.model_dir, model=model, layers=[subject.layer], cache_dir=user_cache_dir(), progress=progress
    )


def write_direction(
    subject: Subject,
    direction: Float64,
    *,
    model: ModelRef,
    ordinary: Ordinary,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    out: Path,
) -> SteerArtifact:
    """Write a direction with the units that ordinary text gives it.

    Args:
        subject: for the card.
        direction: (d_model,), of length 1.
        model: which model that is.
        ordinary: rows of ordinary text after the layer.
        training: what it was made of, for the card.
        evaluation: what was measured, for the card.
        out: folder.
    """
    card = SteerCard(
        name=subject.name,
        description=subject.description,
        model=model,
        tap=str(Tap(subject.layer)),
        more_is=subject.more_is,
        skip_first=ordinary.skip_first,
        median_norm=ordinary.median_norm,
        mean=ordinary.mean(direction),
        ceiling=ordinary.ceiling(direction),
        corpus_rows=len(ordinary.rows),
        corpus_digest=corpus_digest(),
        tensors_digest="0" * 64,
        training=dict(training),
        evaluation=dict(evaluation),
        created_by=subject.created_by,
    )
    return save_steer(out / f"{subject.name}.safetensors", card, direction)
