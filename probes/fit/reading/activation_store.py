"""A folder of collected activations, read: every tensor is a view of its file, nothing is copied. Loads no torch."""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from probes.artifact import sha256_file
from probes.card import ModelRef
from probes.errors import did_you_mean
from probes.fit.reading.activation_manifest import Manifest, ShardRecord, StoreError
from probes.taps import Tap

__all__ = ["OFFSETS", "POSITIONS", "ROLES", "TOKENS", "ActivationStore", "RequestRecord", "Shard", "StoredRequest"]

OFFSETS, TOKENS, POSITIONS, ROLES = "offsets", "tokens", "positions", "roles"
"""Names of a shard's tensors beside those of the taps."""
_DTYPES: Mapping[str, type[np.generic]] = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "U8": np.uint8}

Float32 = npt.NDArray[np.float32]


class RequestRecord(BaseModel):
    """What a shard's JSON line says of a request.

    Attributes:
        line: of the input, from 1.
        num_prompt: tokens of its prompt.
        num_tokens: tokens of its prompt and its reply, kept or not.
        fields: the line's other keys, as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    line: int
    num_prompt: int
    num_tokens: int
    fields: dict[str, Any]


class Shard:
    """One shard. Its files are mapped when they are first asked for.

    Args:
        folder: that it lies in.
        record: what the manifest says of it.
    """

    def __init__(self, folder: Path, record: ShardRecord) -> None:
        self.record = record
        self.tensors_path = folder / f"{record.name}.safetensors"
        self.requests_path = folder / f"{record.name}.jsonl"

    def verify(self) -> None:
        """Compare both files with the manifest.

        Raises:
            StoreError: one is missing, or is not what was written.
        """
        for path, expected in (
            (self.tensors_path, self.record.tensors_digest),
            (self.requests_path, self.record.requests_digest),
        ):
            try:
                found = sha256_file(path)
            except OSError as error:
                raise StoreError(f"{path}: cannot be read ({error.strerror}). Copy the whole folder again.") from error
            if found != expected:
                raise StoreError(
                    f"{path}: SHA-256 is {found[:12]}..., the manifest says {expected[:12]}...: the file is truncated, "
                    "damaged or of another run. Copy the folder again, or collect again into an empty one."
                )

    @cached_property
    def tensors(self) -> Mapping[str, npt.NDArray[Any]]:
        """All tensors by name, read-only, mapped from the file.

        Raises:
            StoreError: the file is damaged.
        """
        try:
            return _map_tensors(self.tensors_path)
        except (OSError, SafetensorError, KeyError) as error:
            raise StoreError(
                f"{self.tensors_path}: not a shard of telltale collect ({error}). Copy the folder again."
            ) from error

    @cached_property
    def records(self) -> tuple[RequestRecord, ...]:
        """Of its requests, in the order of the input.

        Raises:
            StoreError: the file is damaged.
        """
        try:
            lines = self.requests_path.read_bytes().splitlines()
            found = tuple(RequestRecord.model_validate_json(line) for line in lines)
        except (OSError, ValidationError) as error:
            raise StoreError(f"{self.requests_path}: cannot be read ({error}). Copy the folder again.") from error
        if len(found) != self.record.requests:
            raise StoreError(
                f"{self.requests_path}: has {len(found)} lines, the manifest says {self.record.requests}. Copy the "
                "folder again."
            )
        return found


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """The kept tokens of one request. Its arrays are views of the shard's file, read-only.

    Attributes:
        record: its line, its lengths, its label and other fields.
        skip_first: leading positions of every request that are sinks.
    """

    record: RequestRecord
    skip_first: int
    _shard: Shard
    _rows: slice

    def at(self, tap: Tap) -> Float32:
        """The activations at a tap: (kept tokens, d_model) float32.

        Raises:
            StoreError: this tap was not collected.
        """
        found: Float32 = self._tensor(str(tap))
        return found

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """(kept tokens,) ids."""
        return self._tensor(TOKENS)

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        """(kept tokens,) places in the request, from 0."""
        return self._tensor(POSITIONS)

    @property
    def roles(self) -> npt.NDArray[np.uint8]:
        """(kept tokens,) role codes; their names stand in the manifest."""
        return self._tensor(ROLES)

    @property
    def is_sink(self) -> npt.NDArray[np.bool_]:
        """(kept tokens,) whether a token stands at a sink's position."""
        found: npt.NDArray[np.bool_] = self.positions < self.skip_first
        return found

    @property
    def is_response(self) -> npt.NDArray[np.bool_]:
        """(kept tokens,) whether a token is the reply's."""
        found: npt.NDArray[np.bool_] = self.positions >= self.record.num_prompt
        return found

    def _tensor(self, name: str) -> npt.NDArray[Any]:
        tensors = self._shard.tensors
        if name not in tensors:
            known = [tap for tap in tensors if tap not in {OFFSETS, TOKENS, POSITIONS, ROLES}]
            raise StoreError(f"{self._shard.tensors_path}: tap {name!r} was not collected. {did_you_mean(name, known)}")
        return tensors[name][self._rows]


class ActivationStore:
    """A folder that ``telltale collect`` wrote; see ``docs/collect.md``.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
        shards: in the order of the input.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = tuple(Shard(folder, record) for record in manifest.shards)
        self._ends = list(accumulate(record.requests for record in manifest.shards))

    @classmethod
    def open(cls, folder: Path, *, model: ModelRef | None = None, verify: bool = True) -> Self:
        """Open a folder.

        Args:
            folder: that ``telltale collect`` wrote.
            model: the model that the activations must be of; any if left out.
            verify: read every byte and compare it with the digests.
        Raises:
            StoreError: it is damaged, not complete, or of another model.
        """
        manifest = Manifest.read(folder)
        if not manifest.complete:
            raise StoreError(
                f"{folder}: holds {manifest.requests} of {manifest.settings.input_requests} requests. Run the same "
                "telltale collect again: it goes on from there."
            )
        store = cls(folder, manifest)
        if model is not None:
            store.require_model(model)
        if verify:
            for shard in store.shards:
                shard.verify()
        return store

    def require_model(self, model: ModelRef) -> None:
        """Refuse another model than the one that was run.

        Raises:
            StoreError: names each field that differs.
        """
        own = self.manifest.settings.model
        if differing := own.differing(model):
            raise StoreError(
                f"{self.folder}: was collected from {own.id!r} and does not fit {model.id!r}: they differ in "
                f"{', '.join(differing)}. Collect again from this model."
            )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What was collected, in the order of the layers."""
        return tuple(Tap.parse(tap) for tap in self.manifest.settings.taps)

    def __len__(self) -> int:
        """Number of requests."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> StoredRequest:
        """A request by its place in the input, from 0.

        Raises:
            IndexError: there are not so many.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"request {number} of {len(self)}")
        place = bisect_right(self._ends, number)
        shard = self.shards[place]
        return self._request(shard, number - self._ends[place] + shard.record.requests)

    def __iter__(self) -> Iterator[StoredRequest]:
        """Every request, in the order of the input."""
        for shard in self.shards:
            for number in range(shard.record.requests):
                yield self._request(shard, number)

    def _request(self, shard: Shard, number: int) -> StoredRequest:
        offsets = shard.tensors[OFFSETS]
        rows = slice(int(offsets[number]), int(offsets[number + 1]))
        return StoredRequest(shard.records[number], self.manifest.skip_first, shard, rows)


def _map_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Map a safetensors file: a length in 8 bytes, a JSON header of that length, then the tensors.

    The library's own reader copies what it gives to numpy; it only checks the file here.
    """
    with safe_open(path, framework="numpy"), path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    found: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        # A view of the one mapping, with its own type and shape.
        found[name] = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found
