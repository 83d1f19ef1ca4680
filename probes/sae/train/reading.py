"""Reads a corpus up to one layer and keeps the rows on disk, shard by shard; a reading that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from probes.card import ModelRef
from probes.errors import TelltaleError
from probes.fit.reading.network import TappedNetwork
from probes.fit.reading.rendered import Rendered
from probes.sae.train.rows import Float32, RowPool
from probes.taps import Tap

__all__ = ["ReadingError", "RowReader", "leading_sinks"]

_REQUESTS_PER_SHARD = 256
_SINK_POSITIONS = 4
_SINK_FACTOR = 10.0
_SINK_REQUESTS = 64
_BEGINNING = 8
_MANY = 8
_ROWS, _CENTRE = "rows", "centre"


class ReadingError(TelltaleError, ValueError):
    """Rows cannot be kept, or a kept file is damaged."""


class RowReader:
    """A model, computed up to the layer of one tap and no further.

    Args:
        model_dir: folder in transformers' layout.
        model: which model that is.
        tap: what is read.
    """

    def __init__(self, model_dir: Path, *, model: ModelRef, tap: Tap) -> None:
        self._network = TappedNetwork(model_dir, num_layers=model.num_layers, depth=tap.layer + 1)
        self._model = model
        self._tap = tap

    def sinks(self, requests: Sequence[Rendered]) -> int:
        """How many leading positions have a sink's norm; see ``leading_sinks``."""
        read = (self._network.read(request.tokens, [self._tap])[self._tap] for request in requests[:_SINK_REQUESTS])
        return leading_sinks([rows.norm(dim=1) for rows in read])

    def read(
        self,
        requests: Sequence[Rendered],
        *,
        skip_first: int,
        folder: Path,
        progress: Callable[[int, int], None] | None = None,
    ) -> RowPool:
        """The rows of all requests, from their ``first`` on and without sinks, in files under ``folder``.

        They are kept as float16, after the mean of the first shard's rows was taken away: dimensions far from 0 would
        lose what tells their rows apart. In memory is one shard.

        Args:
            requests: what to read.
            skip_first: leading positions that are sinks.
            folder: a folder of its own is made in it for these requests; what lies there is not read again.
            progress: told how many requests of how many are done.
        Raises:
            ReadingError: a row does not fit into float16, or a kept file is damaged.
        """
        place = folder / self._key(requests, skip_first)
        place.mkdir(parents=True, exist_ok=True)
        centre: Float32 | None = None
        shards = []
        for start in range(0, len(requests), _REQUESTS_PER_SHARD):
            path = place / f"shard-{start // _REQUESTS_PER_SHARD:05d}.safetensors"
            if not path.is_file():
                rows = self._rows(requests[start : start + _REQUESTS_PER_SHARD], skip_first)
                _write(path, rows, rows.mean(axis=0) if centre is None else centre)
            kept, centre = _open(path)
            shards.append(kept)
            if progress:
                progress(min(start + _REQUESTS_PER_SHARD, len(requests)), len(requests))
        return RowPool(shards, centre=centre)

    def _rows(self, requests: Sequence[Rendered], skip_first: int) -> Float32:
        found: dict[int, Float32] = {}
        for alike in _begin_alike(requests):
            for place, read in self._network.sweep([requests[number].tokens for number in alike], [self._tap]):
                number = alike[place]
                # A copy: a slice would keep the other positions of the batch in memory.
                found[number] = read[self._tap][requests[number].positions(skip_first)].numpy().copy()
        return np.concatenate([found[number] for number in range(len(requests))])

    def _key(self, requests: Sequence[Rendered], skip_first: int) -> str:
        digest = hashlib.sha256()
        parts: Mapping[str, object] = {
            "model": self._model.model_dump(exclude={"id"}),
            "tap": str(self._tap),
            "skip_first": skip_first,
            "requests_per_shard": _REQUESTS_PER_SHARD,
        }
        digest.update(json.dumps(parts, sort_keys=True).encode())
        for request in requests:
            digest.update(f"{request.first}:{request.tokens}\n".encode())
        return digest.hexdigest()


def _begin_alike(requests: Sequence[Rendered]) -> list[list[int]]:
    """Numbers of requests: chats of one template, whose beginning is then computed once, and all others together."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        groups[request.tokens[:_BEGINNING]].append(number)
    many = [numbers for numbers in groups.values() if len(numbers) >= _MANY]
    few = sorted(number for numbers in groups.values() if len(numbers) < _MANY for number in numbers)
    return [*many, few] if few else many


def leading_sinks(norms: Sequence[torch.Tensor]) -> int:
    """How many leading positions have a norm far above that of the others.

    A position counts when its median norm is ten times the median norm of all positions behind the fourth.

    Args:
        norms: (tokens,) of each request.
    """
    long = [one for one in norms if len(one) > _SINK_POSITIONS]
    if not long:
        return 1
    typical = torch.cat([one[_SINK_POSITIONS:] for one in long]).median()
    high = torch.stack([one[:_SINK_POSITIONS] for one in long]).median(dim=0).values > _SINK_FACTOR * typical
    return max((position + 1 for position in range(_SINK_POSITIONS) if bool(high[position])), default=0)


def _write(path: Path, rows: Float32, centre: Float32) -> None:
    with np.errstate(over="ignore"):  # refused below
        small = (rows - centre).astype(np.float16)
    if not np.all(np.isfinite(small)):
        raise ReadingError(
            f"{path.name}: {int(np.sum(~np.isfinite(small).all(axis=1)))} rows do not fit into float16: the model's "
            "activations are not finite or not sinks alone are far from the others at this tap. Choose another layer."
        )
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
        handle.write(save({_ROWS: small, _CENTRE: centre.astype(np.float32)}))
    os.replace(handle.name, path)


def _open(path: Path) -> tuple[np.memmap[tuple[int, ...], np.dtype[np.float16]], Float32]:
    """The rows, mapped, and what was taken away from them."""
    try:
        with safe_open(path, framework="numpy") as handle:
            shape = tuple(handle.get_slice(_ROWS).get_shape())
            centre: Float32 = handle.get_tensor(_CENTRE)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise ReadingError(f"{path}: cannot be read ({error}). Remove it: these texts are read again.") from error
    offset = 8 + length + header[_ROWS]["data_offsets"][0]
    return np.memmap(path, dtype=np.float16, mode="r", offset=offset, shape=shape), centre
