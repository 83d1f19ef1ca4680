"""Requests with a seed on vLLM's V1 CPU runner: a number drawn for a token that is thrown away is drawn again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class SeededCPURunner(CPUModelRunner):
    """vLLM's CPU runner, for requests with a seed whose prompt is computed in several steps.

    Each such step samples a token that is thrown away, and vLLM then turns the request's generator back by an offset.
    Generators of a CPU have none and raise, which ends the engine: any client could. Here they get back the state they
    had before, so the reply is the one of a prompt computed at once.
    """

    _telltale_before: dict[int, tuple[torch.Generator, torch.Tensor]] | None = None

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        discarded = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        self._telltale_before = {
            row: (generators[row], generators[row].get_state()) for row in discarded if row in generators
        }
        return super()._sample(*args, **kwargs)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        generators, before = self.input_batch.generators, self._telltale_before or {}
        for row, (generator, state) in before.items():
            generator.set_state(state)
            del generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update({row: generator for row, (generator, _) in before.items()})
            self._telltale_before = None
