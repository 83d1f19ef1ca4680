"""The CUDA worker with taps, on whichever of vLLM's two model runners it was started with.

Nothing here may import ``vllm.v1.worker.cpu_worker``, not even indirectly: that module replaces ``torch.cuda.Event``
and ``torch.cuda.Stream`` by objects that do nothing, in the whole process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.worker.gpu_worker import Worker

from serving.engine.status import WorkerStatus

if TYPE_CHECKING:
    from serving.engine.runner_v1 import TappedGPUModelRunner
    from serving.engine.runner_v2 import TappedV2Runner


class TelltaleCUDAWorker(WorkerStatus, Worker):
    """vLLM's GPU worker, with taps."""

    def _make_model_runner(self) -> TappedV2Runner | TappedGPUModelRunner:
        if self.use_v2_model_runner:
            from serving.engine.runner_v2 import TappedV2Runner

            return TappedV2Runner(self.vllm_config, self.device)
        from serving.engine.runner_v1 import TappedGPUModelRunner

        return TappedGPUModelRunner(self.vllm_config, self.device)
