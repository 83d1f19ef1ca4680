"""vLLM's KV-cache manager, telling whoever keeps readouts beside its blocks which of them begin a new life."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager

if TYPE_CHECKING:
    from vllm.v1.request import Request


class MonitoredKVCacheManager(KVCacheManager):
    """The class that the scheduler's manager is given once it has been built: vLLM offers no way to choose it."""

    telltale_handed_out: Callable[[npt.NDArray[np.int64]], None]
    telltale_group: int

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Void what was read of blocks that are handed out anew.

        vLLM puts them into its prefix cache in the same call, before anything is computed: a request that is scheduled
        next, in the same step, may already be given them.
        """
        allocated = super().allocate_slots(request, *args, **kwargs)
        if allocated is not None and allocated.blocks:
            fresh = [block.block_id for block in allocated.blocks[self.telltale_group]]
            if fresh:
                self.telltale_handed_out(np.array(fresh, dtype=np.int64))
        return allocated
