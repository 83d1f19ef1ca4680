"""What monitoring takes of a device's and of the host's memory, measured on the objects that take it.

Everything is bounded when the engine starts: the taps by the bank and the largest step, the store by the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from probes.bank import Bank
from serving.engine.store import ReadoutStore
from serving.engine.taps import tap_buffers

_OUTPUT = "telltale_out"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes.

    Attributes:
        taps: number of taps.
        d_model: width of the stream.
        directions: columns reserved at each tap.
        columns: numbers kept of a token, on all taps together: its readouts and norms.
        max_rows: the most rows of one step.
        num_blocks, block_size: of the KV cache; a block holds ``block_size`` tokens.
        weights: of the bank, on the device: directions, biases, counters.
        outputs: the buffers that a step is read into, on the device.
        store_block: of the readout store for one KV block, on the host.
        store: of the readout store in all.
    """

    taps: int
    d_model: int
    directions: int
    columns: int
    max_rows: int
    num_blocks: int
    block_size: int
    weights: int
    outputs: int
    store_block: int
    store: int


def measure_footprint(bank: Bank, *, max_rows: int, num_blocks: int, block_size: int) -> Footprint:
    """The memory of one engine whose taps are all on one worker.

    The store is made as the engine makes it (its pages are never touched), the buffers of the taps without storage.

    Args:
        bank: what is read.
        max_rows: the most rows of one step (``--max-num-batched-tokens``).
        num_blocks: KV blocks of the engine.
        block_size: tokens in a block.
    Raises:
        MemoryError: this machine cannot even reserve the store's addresses.
    """
    meta = torch.device("meta")
    buffers = [tap_buffers(matrix, max_rows=max_rows, device=meta) for matrix in bank.matrices]
    columns = bank.used_columns()
    store = ReadoutStore(num_blocks=num_blocks, block_size=block_size, columns=columns, width=bank.width)
    return Footprint(
        taps=len(bank.matrices),
        d_model=bank.d_model,
        directions=bank.capacity,
        columns=len(columns),
        max_rows=max_rows,
        num_blocks=num_blocks,
        block_size=block_size,
        weights=sum(buffer.nbytes for tap in buffers for name, buffer in tap.items() if name != _OUTPUT),
        outputs=sum(tap[_OUTPUT].nbytes for tap in buffers),
        store_block=store.block_nbytes,
        store=store.nbytes,
    )
