"""Speculative decoding: which rows of a step belong to tokens that are part of the reply.

A step computes a row for every drafted token. Rows of rejected drafts are of tokens that were never said; so are rows
of accepted drafts behind the token that ends the reply. The row of that last token itself is left out too: without
drafts it is never computed, and a verdict must not depend on how the tokens were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.sched.utils import check_stop

from monitor.monitor import StepReadouts
from serving.engine.readouts import WorkerReadouts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


class _Ahead:
    """A request as it will be with some more tokens; what vLLM's check for the end reads of one."""

    pooling_params = None

    def __init__(self, request: Request) -> None:
        self.sampling_params = request.sampling_params
        self.max_tokens = request.max_tokens
        self.output_token_ids = list(request.output_token_ids)
        self._num_prompt: int = request.num_tokens - request.num_output_tokens
        self.status: Any = None
        self.stop_reason: Any = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self._num_prompt + len(self.output_token_ids)


def rows_of_reply(request: Request, sampled: Sequence[int], *, max_model_len: int) -> int:
    """How many of a request's rows of this step count: the one that it had to compute, and those of drafts to keep.

    Args:
        request: before the tokens are appended.
        sampled: the accepted drafts and the token sampled behind them; at least one.
        max_model_len: of the engine.
    """
    ahead = _Ahead(request)
    for number, token in enumerate(sampled, 1):
        ahead.output_token_ids.append(token)
        if check_stop(ahead, max_model_len):
            return number
    return len(sampled)


def step_readouts(
    readouts: WorkerReadouts,
    scheduled: SchedulerOutput,
    output: ModelRunnerOutput,
    *,
    requests: dict[str, Request],
    max_model_len: int,
) -> StepReadouts:
    """What the worker sent, without the rows of drafts that are not part of a reply."""
    counts = readouts.counts
    starts = np.cumsum(counts) - counts
    drafts = scheduled.scheduled_spec_decode_tokens
    if drafts:
        counts = counts.copy()
        for number, request_id in enumerate(readouts.request_ids):
            sampled = output.sampled_token_ids[output.req_id_to_index[request_id]] if output.sampled_token_ids else []
            request = requests.get(request_id)
            if sampled and request is not None and request_id in drafts:
                needed = int(counts[number]) - len(drafts[request_id])
                counts[number] = needed - 1 + rows_of_reply(request, sampled, max_model_len=max_model_len)
    return StepReadouts(readouts.request_ids, counts, starts, readouts.positions, readouts.readouts)
