"""Requests and settings of collected activations, made up; the numbers say where they belong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probes.card import Format
from probes.fit.reading.activation_manifest import CollectSettings, TokenPositions
from probes.fit.reading.activation_store import RequestRecord
from probes.fit.reading.activation_writer import ActivationWriter, PreparedRequest, ShardBuffer, shards_of
from tests.unit.artifacts import D_MODEL, DIGEST, model_ref

TAPS = ("resid_post.0", "mlp_out.2")
ROLES = {"template": 0, "user": 4}


def settings(count: int, **changes: Any) -> CollectSettings:
    fields: dict[str, Any] = {
        "model": model_ref(),
        "taps": TAPS,
        "format": Format.CHAT,
        "positions": TokenPositions.PROMPT,
        "input_digest": DIGEST,
        "input_requests": count,
        "shard_bytes": 1 << 20,
        "shard_tokens": 40,
        "engine": {"max_num_seqs": 4},
        "created_by": "test",
    }
    return CollectSettings(**(fields | changes))


def requests(count: int, *, longest: int = 20, seed: int = 3) -> list[PreparedRequest]:
    """Of different lengths, the middle of each kept."""
    generator = np.random.default_rng(seed)
    made = []
    for line in range(1, count + 1):
        length = int(generator.integers(1, longest + 1))
        first = int(generator.integers(0, length))
        stop = int(generator.integers(first + 1, length + 1))
        fields = {"label": line % 2, "id": f"r{line}"}
        record = RequestRecord(line=line, num_prompt=length, num_tokens=length, fields=fields)
        tokens = generator.integers(0, 50_000, size=length).tolist()
        roles = generator.integers(0, 6, size=length).astype(np.uint8)
        made.append(PreparedRequest(record, tokens, roles, first, stop))
    return made


def activations(request: PreparedRequest, tap: str) -> np.ndarray:
    """(tokens, d_model): no two rows are equal."""
    place = TAPS.index(tap)
    rows = np.arange(len(request.tokens))[:, None] * 100.0 + np.arange(D_MODEL)
    return (rows + 1e5 * place + 1e4 * request.record.line).astype(np.float32)


def fill(shard: ShardBuffer) -> None:
    for tap, rows in shard.activations.items():
        for number, request in enumerate(shard.requests):
            kept = activations(request, tap)[request.first : request.stop]
            rows[shard.offsets[number] : shard.offsets[number + 1]] = kept


def write(folder: Path, made: Sequence[PreparedRequest], chosen: CollectSettings, *, shards: int | None = None) -> None:
    """As a run does; ``shards``: after how many the run is killed."""
    with ActivationWriter(folder, chosen, roles=ROLES) as writer:
        rest: Iterable[PreparedRequest] = made[writer.manifest.requests :]
        for number, batch in enumerate(shards_of(rest, chosen)):
            if number == shards:
                return
            buffer = ShardBuffer(batch, chosen)
            fill(buffer)
            writer.write(buffer, sinks=len(writer.manifest.shards) % 2)
        writer.finish()
