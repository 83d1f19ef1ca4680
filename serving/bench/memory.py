"""The memory of what was measured, and of a large model's, in words and figures. Measures through serving.engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probes.bank import Bank
from probes.detectors.linear import Linear
from probes.taps import Site, Tap
from serving.bench.cache import KVCache
from serving.deployment import deploy

if TYPE_CHECKING:
    from serving.engine.memory import Footprint

_FORMULA = (
    "Weights: taps x (d_model + 1) x directions x 4 bytes, and 8 for a counter at each tap. Outputs: taps x rows of "
    "the largest step x (directions + 1) x 4. Store: blocks x tokens of a block x (columns x 4 + 1), where a column is "
    "a direction that a detector owns, or a tap's norm. In passing, a tap also needs the stream of the step in float32 "
    "(rows x d_model x 4, given back at once), and a step's readouts are copied once (rows x taps x (directions + 1) "
    "x 4)."
)


@dataclass(frozen=True, slots=True)
class Memory:
    """One line of the table: a configuration and its bytes."""

    what: str
    footprint: Footprint


def benchmark_memory(policy: Path, folder: Path, *, model_id: str, max_rows: int, cache: KVCache) -> Memory:
    """The memory of the server that was measured.

    Args:
        policy: its policy file.
        folder: of its model.
        model_id: what people call the model.
        max_rows: the most rows of one step.
        cache: as the server states it.
    Raises:
        probes.errors.TelltaleError: see ``serving.deployment.deploy``.
    """
    # It imports torch, which has no business in the process that keeps time until the last round is over.
    from serving.engine.memory import measure_footprint

    bank = deploy(policy, model_dir=folder, model_id=model_id, dtype="float32").plan.bank
    footprint = measure_footprint(bank, max_rows=max_rows, num_blocks=cache.num_blocks, block_size=cache.block_size)
    return Memory(f"this benchmark ({model_id})", footprint)


def large_example() -> Memory:
    """A model of 70B parameters with as many taps and directions, 100,000 blocks of 16 tokens, steps of 8,192 rows."""
    from serving.engine.memory import measure_footprint

    bank = dense_bank(d_model=8192, num_layers=80, layers=(20, 40, 60), directions=64)
    footprint = measure_footprint(bank, max_rows=8192, num_blocks=100_000, block_size=16)
    return Memory("an example: 70B, 1.6 million tokens of KV cache", footprint)


def dense_bank(*, d_model: int, num_layers: int, layers: Sequence[int], directions: int) -> Bank:
    """A bank with every column in use.

    Args:
        d_model: width of the stream.
        num_layers: of the model.
        layers: whose outputs are read.
        directions: at each tap.
    """
    direction = np.full(d_model, d_model**-0.5)
    detectors = [
        Linear(f"{layer}-{number}", Tap(layer, Site.RESID_POST), direction, 0.0)
        for layer in layers
        for number in range(directions)
    ]
    return Bank(detectors, d_model=d_model, num_layers=num_layers, capacity=directions)


def markdown(lines: Sequence[Memory]) -> str:
    """The section of the report."""
    header = (
        "",
        "taps x directions",
        "d_model",
        "rows of a step",
        "KV blocks x tokens",
        "weights",
        "outputs",
        "store, per KV block",
        "store, per token",
        "store in all",
    )
    rows = [header, ("---",) * len(header), *(_row(line) for line in lines)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    where = (
        "Weights and outputs are on the model's device, the store is on the host. All of it is reserved when the "
        "engine starts and never grows: a KV block that is used anew loses its old readouts. The sizes are "
        "read off the tensors and arrays that the engine makes (`serving/engine/memory.py`); as a formula:"
    )
    return f"## Memory\n\n{table}\n\n{where}\n\n{_FORMULA}"


def _row(line: Memory) -> tuple[str, ...]:
    found = line.footprint
    return (
        line.what,
        f"{found.taps} x {found.directions}",
        f"{found.d_model:,}",
        f"{found.max_rows:,}",
        f"{found.num_blocks:,} x {found.block_size}",
        _size(found.weights),
        _size(found.outputs),
        _size(found.store_block),
        _size(found.store_block // found.block_size),
        _size(found.store),
    )


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
