"""Cached prefixes stay seen: readouts are filed under the KV blocks of their tokens and replayed on reuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from probes.bank import Bank
from serving.engine.blocks import MonitoredKVCacheManager
from serving.engine.placement import Span, places_of
from serving.engine.readouts import WorkerReadouts
from serving.engine.shelves import Reading, Shelves
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
        plan: digest of the plan that reads so.
        margin: tokens by which a position may lie before the one that the scheduler expects (rejected drafts).
    """

    def __init__(self, manager: KVCacheManager, group: int, bank: Bank, *, margin: int, plan: str = "") -> None:
        groups = manager.kv_cache_config.kv_cache_groups
        self._blocks_of = manager.coordinator.single_type_managers[group].req_to_blocks
        self._group = group
        self._is_alone = len(groups) == 1
        self._margin = margin
        self._width = bank.width
        self._shelves = Shelves(
            num_blocks=manager.kv_cache_config.num_blocks,
            block_size=groups[group].kv_cache_spec.block_size,
            width=bank.width,
        )
        self._readings: dict[str, Reading] = {}
        self.hold({plan: bank})
        manager.telltale_handed_out = self._expect
        manager.telltale_group = group
        manager.__class__ = MonitoredKVCacheManager
        self._spans: dict[int, _Step] = {}
        self._hits: dict[str, tuple[Reading, npt.NDArray[np.int64]]] = {}
        self._waiting: list[tuple[_Step, WorkerReadouts]] = []

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._shelves.block_size

    def hold(self, banks: Mapping[str, Bank]) -> None:
        """Keep from now on what these banks read; the columns of those that are new hold their directions already.

        Args:
            banks: by the digests of the plans that requests run under or may begin with.
        """
        if self._readings:
            self.settle()
        entries = {plan: bank.entries() for plan, bank in banks.items()}
        self._shelves.hold(entry for found in entries.values() for entry in found)
        self._readings = {plan: self._shelves.reading(found) for plan, found in entries.items()}

    def scheduled(self, step: SchedulerOutput, requests: Mapping[str, Request]) -> None:
        """Remember which blocks the rows of a step fall into."""
        size = self.block_size
        spans = {}
        for request_id, count in step.num_scheduled_tokens.items():
            end = requests[request_id].num_computed_tokens
            first = max(0, end - count - self._margin) // size
            blocks = self._blocks_of[request_id][first : (end - 1) // size + 1]
            spans[request_id] = Span(first, [block.block_id for block in blocks])
        # What was computed before a direction stood in its column says nothing of it.
        self._spans[id(step)] = _Step(spans, self._shelves.stores)

    def file(self, step: SchedulerOutput, readouts: WorkerReadouts | None) -> None:
        """Keep a step's rows, of all its requests: blocks of aborted ones may be handed to others too.

        They are written with the next ``settle``, which everything else here that looks at the store begins with.

        Args:
            step: as scheduled.
            readouts: None if they were lost.
        Raises:
            ValueError: they do not fit together, or not the bank; they count as lost.
        """
        scheduled = self._spans.pop(id(step), _Step({}, ()))
        wrong = _misfit(readouts, self._width) if readouts is not None else None
        if readouts is not None and wrong is None:
            self._waiting.append((scheduled, readouts))
            return
        self.settle()
        for span in scheduled.spans.values():
            for store in self._shelves.stores:
                store.lose(np.array(span.blocks, dtype=np.int64))
        if wrong is not None:
            raise ValueError(wrong)

    def settle(self) -> None:
        """Write what was filed: best while the device computes, since no decision waits for it."""
        waiting, self._waiting = self._waiting, []
        for step, found in waiting:
            places = places_of(step.spans, found.request_ids, found.counts, found.positions, block_size=self.block_size)
            rows = found.readouts[places.rows]
            for store in step.stores:
                store.file(places.blocks, places.offsets, rows)

    def lose_all(self) -> None:
        """What was read so far cannot be relied on any more."""
        self.settle()
        for store in self._shelves.stores:
            store.lose_all()

    def allow(
        self, request_id: str, hit: KVCacheBlocks, num_tokens: int, *, filed: bool = False, plan: str = ""
    ) -> int:
        """How many tokens of a prefix-cache hit may be used: as many as have readouts, or will have them.

        Args:
            request_id: whose hit.
            hit: its blocks.
            num_tokens: that they hold.
            filed: whether the readouts must be there already.
            plan: digest of the plan that the request is under.
        """
        blocks = np.array(
            [block.block_id for block in hit.blocks[self._group][: num_tokens // self.block_size]], dtype=np.int64
        )
        if filed:
            self.settle()
        reading = self._readings[plan]
        covered = reading.covered(blocks, filed=filed) if len(blocks) else 0
        if not self._is_alone and covered * self.block_size < num_tokens:
            # Groups with a sliding window keep the blocks before the end of a hit: it is taken whole or not at all.
            covered = 0
        if covered:
            self._hits[request_id] = reading, blocks[:covered]
        else:
            self._hits.pop(request_id, None)
        return covered * self.block_size

    def has_replay(self, request_id: str) -> bool:
        """Whether a cached prefix of this request has not been replayed yet."""
        return request_id in self._hits

    def take_replay(self, request_id: str, before: int) -> npt.NDArray[np.float32]:
        """The rows of a request's cached prefix, once: positions 0 up to ``before``."""
        self.settle()
        reading, blocks = self._hits.pop(request_id)
        return reading.read(blocks)[:before]

    def replayable(self, request_ids: Iterable[str]) -> list[str]:
        """Those of these requests whose cached prefix is filed as a whole: the others rest on steps under way."""
        if not self._hits:
            return []
        self.settle()
        found = ((name, self._hits[name]) for name in request_ids if name in self._hits)
        return [name for name, (reading, blocks) in found if reading.is_filed(blocks)]

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._hits.pop(request_id, None)

    def _expect(self, blocks: npt.NDArray[np.int64]) -> None:
        self.settle()
        for store in self._shelves.stores:
            store.expect(blocks)


class _Step(NamedTuple):
    """Where the rows of a step that was scheduled go, and onto which shelves."""

    spans: Mapping[str, Span]
    stores: Sequence[ReadoutStore]


def _misfit(found: WorkerReadouts, width: int) -> str | None:
    """What is wrong with a step's readouts, if anything is."""
    rows, counts = len(found.positions), found.counts
    if found.readouts.shape != (rows, width):
        return f"readouts have the shape {found.readouts.shape}; {rows} rows of {width} were expected"
    if len(counts) != len(found.request_ids) or int(counts.sum()) != rows or bool((counts < 0).any()):
        return f"{len(found.request_ids)} requests with {counts.tolist()} rows do not make {rows} rows"
    return None
