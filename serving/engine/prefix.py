"""Cached prefixes stay seen: readouts are filed under the KV blocks of their tokens and replayed on reuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from probes.bank import Bank
from serving.engine.blocks import MonitoredKVCacheManager
from serving.engine.placement import Span, places_of
from serving.engine.readouts import WorkerReadouts
from serving.engine.store import ReadoutStore

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


def whole_group(manager: KVCacheManager) -> int | None:
    """The number of the first group of layers that keeps a block for every token; None if there is none."""
    for number, group in enumerate(manager.kv_cache_config.kv_cache_groups):
        # Exactly these classes: some that derive from them free the blocks of old tokens.
        if type(group.kv_cache_spec) in {FullAttentionSpec, MLAAttentionSpec}:
            return number
    return None


class PrefixReadouts:
    """The readouts behind vLLM's prefix cache, for one engine.

    Readouts stand beside the blocks of one group of layers, which has a block for every token.

    Args:
        manager: the scheduler's; its class is replaced, so that blocks which are handed out anew are noticed.
        group: number of the group, from ``whole_group``.
        bank: what a row of readouts holds.
        margin: tokens by which a position may lie before the one that the scheduler expects (rejected drafts).
    """

    def __init__(self, manager: KVCacheManager, group: int, bank: Bank, *, margin: int) -> None:
        groups = manager.kv_cache_config.kv_cache_groups
        self._blocks_of = manager.coordinator.single_type_managers[group].req_to_blocks
        self._group = group
        self._is_alone = len(groups) == 1
        self._margin = margin
        self.store = ReadoutStore(
            num_blocks=manager.kv_cache_config.num_blocks,
            block_size=groups[group].kv_cache_spec.block_size,
            columns=bank.used_columns(),
            width=bank.width,
        )
        manager.telltale_store = self.store
        manager.telltale_group = group
        manager.__class__ = MonitoredKVCacheManager
        self._spans: dict[int, dict[str, Span]] = {}
        self._hits: dict[str, npt.NDArray[np.int64]] = {}

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.store.block_size

    def scheduled(self, step: SchedulerOutput, requests: Mapping[str, Request]) -> None:
        """Remember which blocks the rows of a step fall into."""
        size = self.block_size
        spans = {}
        for request_id, count in step.num_scheduled_tokens.items():
            end = requests[request_id].num_computed_tokens
            first = max(0, end - count - self._margin) // size
            blocks = self._blocks_of[request_id][first : (end - 1) // size + 1]
            spans[request_id] = Span(first, [block.block_id for block in blocks])
        self._spans[id(step)] = spans

    def file(self, step: SchedulerOutput, readouts: WorkerReadouts | None) -> None:
        """Keep a step's rows, of all its requests: blocks of aborted ones may be handed to others too.

        Args:
            step: as scheduled.
            readouts: None if they were lost.
        """
        spans = self._spans.pop(id(step), {})
        if readouts is None:
            for span in spans.values():
                self.store.lose(np.array(span.blocks, dtype=np.int64))
            return
        places = places_of(spans, readouts.request_ids, readouts.counts, readouts.positions, block_size=self.block_size)
        self.store.file(places.blocks, places.offsets, readouts.readouts[places.rows])

    def allow(self, request_id: str, hit: KVCacheBlocks, num_tokens: int) -> int:
        """How many tokens of a prefix-cache hit may be used: as many as have readouts, or will have them."""
        blocks = np.array(
            [block.block_id for block in hit.blocks[self._group][: num_tokens // self.block_size]], dtype=np.int64
        )
        covered = self.store.covered(blocks) if len(blocks) else 0
        if not self._is_alone and covered * self.block_size < num_tokens:
            # Groups with a sliding window keep the blocks before the end of a hit: it is taken whole or not at all.
            covered = 0
        if covered:
            self._hits[request_id] = blocks[:covered]
        else:
            self._hits.pop(request_id, None)
        return covered * self.block_size

    def has_replay(self, request_id: str) -> bool:
        """Whether a cached prefix of this request has not been replayed yet."""
        return request_id in self._hits

    def take_replay(self, request_id: str, before: int) -> npt.NDArray[np.float32]:
        """The rows of a request's cached prefix, once: positions 0 up to ``before``."""
        return self.store.read(self._hits.pop(request_id))[:before]

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._hits.pop(request_id, None)
