"""vLLM's KV-cache manager, telling the readout store which blocks begin a new life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager

from serving.engine.store import ReadoutStore

if TYPE_CHECKING:
    from vllm.v1.request import Request


class MonitoredKVCacheManager(KVCacheManager):
    """The class that the scheduler's manager is given once it has been built: vLLM offers no way to choose it."""

    telltale_store: ReadoutStore
    telltale_group: int

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Void what the store holds of blocks that are handed out anew.

        vLLM puts them into its prefix cache in the same call, before anything is computed: a request that is scheduled
        next, in the same step, may already be given them.
        """
        allocated = super().allocate_slots(request, *args, **kwargs)
        if allocated is not None and allocated.blocks:
            fresh = [block.block_id for block in allocated.blocks[self.telltale_group]]
            if fresh:
                self.telltale_store.expect(np.array(fresh, dtype=np.int64))
        return allocated
