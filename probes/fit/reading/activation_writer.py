"""Writes a folder of activations, shard by shard; killed at any moment, it goes on behind the last complete one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from probes.artifact import sha256_file
from probes.fit.reading.activation_manifest import MANIFEST, CollectSettings, Manifest, ShardRecord, StoreError
from probes.fit.reading.activation_store import OFFSETS, POSITIONS, ROLES, TOKENS, RequestRecord, Shard

__all__ = ["ActivationWriter", "PreparedRequest", "ShardBuffer", "shards_of"]

_PER_TOKEN = 4 + 4 + 1
"""Bytes of a token's id, position and role."""
_MOST_SHOWN = 200
"""Characters of a setting in a message."""


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRequest:
    """A request whose tokens are known.

    Attributes:
        record: what is kept of its line.
        tokens: ids, all that are computed.
        roles: (len(tokens),) role codes.
        first, stop: the tokens from ``first`` up to ``stop`` are kept; at least one.
    """

    record: RequestRecord
    tokens: Sequence[int]
    roles: npt.NDArray[np.uint8]
    first: int
    stop: int

    @property
    def num_kept(self) -> int:
        """Tokens that are kept."""
        return self.stop - self.first


def shards_of(requests: Iterable[PreparedRequest], settings: CollectSettings) -> Iterator[list[PreparedRequest]]:
    """Cut requests into shards, in order: the same ones however often a run was interrupted.

    Args:
        requests: in the order of the input, taken as they are needed.
        settings: with the limits of a shard.
    """
    size = len(settings.taps) * settings.model.d_model * 4 + _PER_TOKEN
    shard: list[PreparedRequest] = []
    kept = computed = 0
    for request in requests:
        is_full = (kept + request.num_kept) * size > settings.shard_bytes
        if shard and (is_full or computed + len(request.tokens) > settings.shard_tokens):
            yield shard
            shard, kept, computed = [], 0, 0
        shard.append(request)
        kept += request.num_kept
        computed += len(request.tokens)
    if shard:
        yield shard


class ShardBuffer:
    """The tensors of one shard in memory, with room for exactly its rows.

    Args:
        requests: of the shard.
        settings: of the run.

    Attributes:
        requests: of the shard.
        offsets: (requests + 1,) int64: request i has the rows from offsets[i] to offsets[i + 1].
        activations: by the tap's name, (rows, d_model) float32, to be filled.
    """

    def __init__(self, requests: Sequence[PreparedRequest], settings: CollectSettings) -> None:
        self.requests = tuple(requests)
        self.offsets = np.zeros(len(requests) + 1, dtype=np.int64)
        np.cumsum([request.num_kept for request in requests], out=self.offsets[1:])
        shape = (int(self.offsets[-1]), settings.model.d_model)
        self.activations: Mapping[str, npt.NDArray[np.float32]] = {
            tap: np.empty(shape, dtype=np.float32) for tap in settings.taps
        }

    @property
    def rows(self) -> int:
        """Kept tokens."""
        return int(self.offsets[-1])

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """All tensors of the shard, by name."""
        kept = [slice(request.first, request.stop) for request in self.requests]
        pairs = list(zip(self.requests, kept, strict=True))
        return {
            **self.activations,
            OFFSETS: self.offsets,
            TOKENS: np.concatenate([np.array(request.tokens[part], dtype=np.int32) for request, part in pairs]),
            POSITIONS: np.concatenate([np.arange(part.start, part.stop, dtype=np.int32) for part in kept]),
            ROLES: np.concatenate([request.roles[part] for request, part in pairs]),
        }


class ActivationWriter:
    """A folder that is being filled; no other process may fill it meanwhile.

    Args:
        folder: an empty one, a new one, or one in which the same run was interrupted.
        settings: of the run.
        roles: role codes, by the role's name.
    Raises:
        StoreError: the folder holds something else, or another process is at work in it.
    """

    def __init__(self, folder: Path, settings: CollectSettings, *, roles: Mapping[str, int]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"{folder}: no folder can be made there ({error.strerror}). Name another one.") from error
        try:
            self.manifest = self._begin(settings, roles)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        """Nothing is left to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others into the folder."""
        os.close(self._lock)

    def write(self, shard: ShardBuffer, *, sinks: int) -> None:
        """Write the next shard. Once this returns, the shard survives whatever happens.

        Args:
            shard: with all its rows.
            sinks: leading positions with a sink's norm.
        Raises:
            StoreError: it cannot be written.
        """
        try:
            self._write(f"shard-{len(self.manifest.shards):05d}", shard, sinks)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{self.folder}: cannot be written ({error}). Make room there, then run the same command again: it "
                "goes on behind the last complete shard."
            ) from error

    def finish(self) -> None:
        """Say that nothing is missing.

        Raises:
            StoreError: the shards do not hold every line of the input.
        """
        wanted = self.manifest.settings.input_requests
        if self.manifest.requests != wanted:
            raise StoreError(
                f"{self.folder}: {self.manifest.requests} requests were written, the input has {wanted}. It was "
                "changed while it was read: collect again into an empty folder."
            )
        self._say(self.manifest.model_copy(update={"complete": True}))

    def _begin(self, settings: CollectSettings, roles: Mapping[str, int]) -> Manifest:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{self.folder}: another telltale collect is writing there. Wait for it, or name another folder."
            ) from error
        present = sorted(path.name for path in self.folder.iterdir() if not path.name.endswith(".partial"))
        if MANIFEST in present:
            found = Manifest.read(self.folder)
            if found.shards:
                _require_same(self.folder, found.settings, settings)
                for record in found.shards:
                    Shard(self.folder, record).verify()
                return found
            # Nothing would be lost: a run that found a wrong line, say, can be begun anew with the corrected file.
        elif present:
            raise StoreError(
                f"{self.folder}: holds {present[0]!r} and is no folder of telltale collect. Name an empty or a new one."
            )
        manifest = Manifest(settings=settings, roles=dict(roles), complete=False)
        self._say(manifest)
        return manifest

    def _write(self, name: str, shard: ShardBuffer, sinks: int) -> None:
        tensors = self.folder / f"{name}.safetensors"
        save_file(shard.tensors(), _partial(tensors))
        _settle(_partial(tensors), tensors)
        lines = "".join(json.dumps(request.record.model_dump()) + "\n" for request in shard.requests).encode()
        self._replace(self.folder / f"{name}.jsonl", lines)
        record = ShardRecord(
            name=name,
            requests=len(shard.requests),
            rows=shard.rows,
            tokens=sum(len(request.tokens) for request in shard.requests),
            tensors_digest=sha256_file(tensors),
            requests_digest=hashlib.sha256(lines).hexdigest(),
            sinks=sinks,
        )
        self._say(self.manifest.model_copy(update={"shards": (*self.manifest.shards, record)}))

    def _say(self, manifest: Manifest) -> None:
        text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        self._replace(self.folder / MANIFEST, text.encode())
        self.manifest = manifest

    @staticmethod
    def _replace(path: Path, data: bytes) -> None:
        partial = _partial(path)
        partial.write_bytes(data)
        _settle(partial, path)


def _partial(path: Path) -> Path:
    """What a file is called until all of it is written; the next attempt overwrites it."""
    return path.with_name(f"{path.name}.partial")


def _settle(partial: Path, path: Path) -> None:
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(partial, path)


def _require_same(folder: Path, found: CollectSettings, wanted: CollectSettings) -> None:
    changes = [
        f"{name} was {_short(getattr(found, name))}, is {_short(getattr(wanted, name))}"
        for name in CollectSettings.model_fields
        if name != "model" and getattr(found, name) != getattr(wanted, name)
    ]
    changes += [f"the model differs in {field}" for field in found.model.differing(wanted.model)]
    if changes:
        raise StoreError(
            f"{folder}: was begun with other settings: {'; '.join(changes)}. Run it with the same ones to go on, or "
            "name another folder."
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
