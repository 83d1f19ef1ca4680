"""The CUDA worker with taps, on vLLM's V1 runner."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from serving.engine.runner_v1 import TappedGPUModelRunner
from serving.engine.worker import WorkerStatus


class TelltaleCUDAWorker(WorkerStatus, Worker):
    """vLLM's GPU worker, with taps."""

    def _make_model_runner(self) -> TappedGPUModelRunner:
        return TappedGPUModelRunner(self.vllm_config, self.device)
