"""The CPU worker with taps: vLLM's own class whose model runner is replaced by ours."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from serving.engine.runner_v1 import TappedCPUModelRunner
from serving.engine.status import WorkerStatus


class TelltaleCPUWorker(WorkerStatus, CPUWorker):
    """vLLM's CPU worker, with taps."""

    def init_device(self) -> None:
        """Build vLLM's runner, then make it ours: the CPU worker offers no other way in."""
        super().init_device()
        if self.use_v2_model_runner:
            from serving.engine.runner_v2 import TappedV2CPUModelRunner

            self.model_runner.__class__ = TappedV2CPUModelRunner
        else:
            self.model_runner.__class__ = TappedCPUModelRunner
